"""What the pipeline's machinery costs where there is no pipeline: a step of one rank through the executor, cut into
stages and run by a schedule without pairs, over the plain forward and backward."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from support.record import interleaved

from abyssal.parallel.pipeline.chunk import ModelChunk
from abyssal.parallel.pipeline.executor import Executor
from abyssal.parallel.pipeline.schedule import schedule
from abyssal.train.balance import add_loads
from abyssal.train.loop import build_model
from abyssal.train.passes import Given, Sums, run_passes

from .setting import RANKS, Setting


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step, a round each, in turns."""

    micro_batches: int
    plain: list[float]
    executor: list[float]

    @property
    def share(self) -> float:
        """That the executor takes more; the median of rounds, each over its own neighbour."""
        rounds = zip(self.executor, self.plain, strict=True)
        return statistics.median(executor / plain for executor, plain in rounds) - 1

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def measure_overhead(setting: Setting, micro_batches: int, repeats: int) -> Overhead:
    """On one core with one thread, all experts here."""
    setting = replace(setting, micro_batches=micro_batches)
    with _on_one_core():
        model = build_model(setting.spec, setting.config)
        batches = setting.batches(0)
        chunk = ModelChunk(model, range(setting.layers), 0, 1)
        executor = Executor(schedule("1f1b", 1, micro_batches), 0, [chunk])
        given = [setting.micro_batch(model, 0, number, part, None, dealt=False) for number, part in enumerate(batches)]
        counts = [RANKS * setting.tokens * micro_batches]

        def plain() -> float:
            _forget_gradients(model)
            began = time.perf_counter()
            run_passes(model, Given(batches, counts, 0.0, None, None), lambda: None)
            return time.perf_counter() - began

        def through_executor() -> float:
            _forget_gradients(model)
            began = time.perf_counter()
            chunk.begin(given)
            executor.run(setting.boundary)
            sums = Sums([sum(float(loss) for losses in chunk.losses.values() for loss in losses)])
            for step in chunk.steps.values():
                add_loads(sums.loads, step.routings)
            return time.perf_counter() - began

        found = interleaved({"plain": plain, "executor": through_executor}, repeats)
        executor.close()
    return Overhead(micro_batches, **found)


def _forget_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


@contextmanager
def _on_one_core() -> Iterator[None]:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
