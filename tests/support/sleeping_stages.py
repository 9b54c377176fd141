"""Ranks of a pipeline as threads of one process, over gloo, whose chunks sleep: schedules in real time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from abyssal.parallel.pipeline.messages import Boundary
from abyssal.parallel.pipeline.schedule import Schedule

Result = TypeVar("Result")


class SleepingChunk:
    """A stage that sleeps, and knows what it must be given: messages carry what they are.

    Args:
        unit: seconds of a forward, and of either part of a backward.
    """

    def __init__(self, stage: int, num_stages: int, unit: float = 0.0) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self.unit = unit
        self.done: list[tuple[str, int]] = []
        self.lasted: dict[tuple[str, int], float] = {}
        """Seconds by kind and micro-batch: a busy machine wakes nobody in time."""

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        self._do("F", micro_batch)
        self._check(x_TD, None if self.stage == 0 else self._value(1, self.stage - 1, micro_batch))
        last = self.stage == self.num_stages - 1
        return None if last else self._value(1, self.stage, micro_batch)

    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        self._do("I", micro_batch)
        last = self.stage == self.num_stages - 1
        self._check(gradient_TD, None if last else self._value(2, self.stage + 1, micro_batch))
        return None if self.stage == 0 else self._value(2, self.stage, micro_batch)

    def backward_weight(self, micro_batch: int) -> None:
        self._do("W", micro_batch)

    def catch_up(self) -> None:
        """Nothing is left over."""

    def _do(self, kind: str, micro_batch: int) -> None:
        began = time.perf_counter()
        if self.unit:
            time.sleep(self.unit)
        self.done.append((kind, micro_batch))
        self.lasted[kind, micro_batch] = time.perf_counter() - began

    def _value(self, what: int, stage: int, micro_batch: int) -> Tensor:
        return torch.tensor([[what, stage, micro_batch]], dtype=torch.float32)

    def _check(self, found: Tensor | None, wanted: Tensor | None) -> None:
        assert found is None if wanted is None else found is not None and torch.equal(found, wanted), (found, wanted)


def chunks_of(plan: Schedule, rank: int, unit: float = 0.0) -> list[SleepingChunk]:
    return [SleepingChunk(stage, plan.num_stages, unit) for stage in plan.chunks[rank]]


def boundary(num_micro_batches: int) -> Boundary:
    return Boundary([(1, 3)] * num_micro_batches, torch.float32, torch.device("cpu"))


def on_threads(size: int, function: Callable[[int, Any], Result]) -> list[Result | Exception]:
    """``function(rank, group)`` on each rank; what it returned or raised.  A rank that raises takes its group down."""
    store = distributed.HashStore()
    found: dict[int, Result | Exception] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = function(rank, _gloo(store, rank, size))
        except Exception as error:
            found[rank] = error.with_traceback(None)  # whose frames would keep the group's connections open

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == size, f"ranks {sorted(set(range(size)) - found.keys())} hang"
    return [found[rank] for rank in range(size)]


def _gloo(store: Any, rank: int, size: int) -> Any:
    backend: Any = distributed.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timedelta(seconds=30)
    options._devices = [backend.create_device(hostname="127.0.0.1")]
    return backend(store, rank, size, options)


def results(found: Sequence[Result | Exception]) -> list[Result]:
    """Of ranks that all went well."""
    for one in found:
        if isinstance(one, Exception):
            raise one
    return [one for one in found if not isinstance(one, Exception)]
