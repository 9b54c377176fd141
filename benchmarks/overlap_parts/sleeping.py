"""Four ranks whose stages sleep, under several schedules: the executor's time beside the simulator's.

Ranks are threads of this process, over gloo.  A stage sleeps a unit for its forward and for each part of its backward,
and two units for a pair: as if its communication were as long as its computation and hidden.  What the executor takes
more than the simulator is the cost of messages and of the machine's waking late.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from abyssal.parallel.pipeline.chunk import Chunk
from abyssal.parallel.pipeline.executor import Executor
from abyssal.parallel.pipeline.messages import Boundary
from abyssal.parallel.pipeline.schedule import Schedule, schedule
from abyssal.parallel.pipeline.simulate import Times, simulate

NAMES = ("1f1b", "zb1p", "dualpipe")
RANKS = 4
PAIR_UNITS = 2
"""Of a forward and a whole backward, which take three one after the other."""


@dataclass(frozen=True)
class Slept:
    """One schedule."""

    name: str
    micro_batches: int
    unit: float
    """Seconds."""
    executor: list[float]
    """Seconds of a step, a round each: of the slowest rank, all of which begin together."""
    simulator: float
    """Seconds."""

    @property
    def excess(self) -> float:
        """Of the executor over the simulator, as a share."""
        return statistics.median(self.executor) / self.simulator - 1

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "excess": self.excess}


class SleepingChunk:
    """A stage that computes nothing."""

    def __init__(self, stage: int, num_stages: int, unit: float) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self.unit = unit

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        time.sleep(self.unit)
        return self.output()

    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        time.sleep(self.unit)
        return self.gradient()

    def backward_weight(self, micro_batch: int) -> None:
        time.sleep(self.unit)

    def catch_up(self) -> None:
        """Nothing is left over."""

    def output(self) -> Tensor | None:
        return None if self.stage == self.num_stages - 1 else torch.zeros(1, 1)

    def gradient(self) -> Tensor | None:
        return None if self.stage == 0 else torch.zeros(1, 1)


def pair(
    ahead: Chunk, forward: int, x_TD: Tensor | None, back: Chunk, backward: int, gradient_TD: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A forward and a backward that are overlapped."""
    assert isinstance(ahead, SleepingChunk) and isinstance(back, SleepingChunk)
    time.sleep(PAIR_UNITS * ahead.unit)
    return ahead.output(), back.gradient()


def measure_sleeping(micro_batches: int, unit: float, repeats: int) -> list[Slept]:
    return [_measured(name, micro_batches, unit, repeats) for name in NAMES]


def _measured(name: str, micro_batches: int, unit: float, repeats: int) -> Slept:
    plan = schedule(name, RANKS, micro_batches)
    store = distributed.HashStore()
    together = threading.Barrier(RANKS)
    found: dict[int, list[float]] = {}

    def run(rank: int) -> None:
        group = _gloo(store, rank)
        chunks = [SleepingChunk(stage, plan.num_stages, unit) for stage in plan.chunks[rank]]
        executor = Executor(plan, rank, chunks, group, pair)
        boundary = Boundary([(1, 1)] * micro_batches, torch.float32, torch.device("cpu"))
        seconds = []
        for _ in range(repeats + 1):  # the first connects
            together.wait()
            seconds.append(executor.run(boundary).seconds)
        executor.close()
        found[rank] = seconds[1:]

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60 + 60 * unit * micro_batches * (repeats + 1))
    if len(found) < RANKS:
        raise RuntimeError(f"{name}: ranks {sorted({*range(RANKS)} - found.keys())} failed or hang")
    return Slept(name, micro_batches, unit, [*map(max, zip(*found.values(), strict=True))], _simulated(plan) * unit)


def _simulated(plan: Schedule) -> float:
    return simulate(plan, Times(pair=PAIR_UNITS)).makespan


def _gloo(store: Any, rank: int) -> Any:
    backend: Any = distributed.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timedelta(seconds=60)
    options._devices = [backend.create_device(hostname="127.0.0.1")]
    return backend(store, rank, RANKS, options)
