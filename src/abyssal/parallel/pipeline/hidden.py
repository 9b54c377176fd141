"""How much of a step's communication passed while the rank computed: the share that is hidden.

A rank's main thread either computes or waits.  A communication lasts from its start to its completion; what of that
time the main thread spent waiting, for this or for anything else, was not hidden, the rest was.  The share of a step is
hidden time over all communication time, every one counted for itself.  Messages between stages count where they are
sent.  On a GPU, where the main thread only enqueues, these are times of the host: a profiler tells of streams.

The trade-off not taken: to run a step once more without communication and compare, which costs a step; the benchmark
does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from abyssal.model.dispatch import Dispatcher, DispatchPlan, Handle

Result = TypeVar("Result", covariant=True)
Sent = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class StepTimes:
    """Of one step on one rank, in seconds."""

    seconds: float
    waiting: float
    """For messages and tokens of other ranks."""
    communicating: float
    """From start to completion, added up over all that was sent."""
    hidden: float
    """What of that passed while the rank computed."""

    @property
    def computing(self) -> float:
        return self.seconds - self.waiting

    @property
    def hidden_share(self) -> float | None:
        """None where nothing was sent."""
        return self.hidden / self.communicating if self.communicating else None


class Stopwatch:
    """Notes of one rank's step; the main thread alone writes them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.begin()

    def begin(self) -> None:
        """Forget what was noted: a step begins."""
        self._began = self.clock()
        self._waits: list[tuple[float, float]] = []
        self._communications: list[tuple[float, float]] = []

    @contextmanager
    def waiting(self) -> Any:
        """The main thread waits inside; within another, it counts once."""
        began = self.clock()
        try:
            yield
        finally:
            self._waits.append((began, self.clock()))

    def communicated(self, began: float, ended: float) -> None:
        """Something was on its way from ``began`` to ``ended``, by :attr:`clock`."""
        self._communications.append((began, ended))

    def times(self) -> StepTimes:
        """Of what was noted since the step began."""
        waits = _merged(self._waits)
        lasted = sum(ended - began for began, ended in self._communications)
        seen = sum(_common(one, waits) for one in self._communications)
        waited = sum(ended - began for began, ended in waits)
        return StepTimes(self.clock() - self._began, waited, lasted, lasted - seen)


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order, those that overlap as one."""
    merged: list[tuple[float, float]] = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def _common(span: tuple[float, float], spans: list[tuple[float, float]]) -> float:
    """Seconds of ``span`` that lie in one of ``spans``."""
    return sum(max(0.0, min(span[1], ended) - max(span[0], began)) for began, ended in spans)


class MeasuredDispatcher:
    """A dispatcher between ranks whose communication is noted on a stopwatch."""

    def __init__(self, dispatcher: Dispatcher, stopwatch: Stopwatch) -> None:
        self.dispatcher = dispatcher
        self._stopwatch = stopwatch

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        return self.dispatcher.plan(layer, expert_ids_TK)

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any) -> Handle[Sent]:
        began = self._stopwatch.clock()
        return _Measured(self.dispatcher.start_dispatch(x_TD, weights_TK, plan), self._stopwatch, began)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any) -> Handle[Sent]:
        began = self._stopwatch.clock()
        return _Measured(self.dispatcher.start_combine(rows_AD, weights_A, plan), self._stopwatch, began)


class _Measured(Generic[Result]):
    """A handle that notes when its communication ended: by its own word (a lane's), or when it had been waited for."""

    def __init__(self, handle: Handle[Result], stopwatch: Stopwatch, began: float) -> None:
        self._handle = handle
        self._stopwatch = stopwatch
        self._began = began

    def wait(self) -> Result:
        with self._stopwatch.waiting():
            result = self._handle.wait()
        ended = getattr(self._handle, "ended", None)
        self._stopwatch.communicated(self._began, self._stopwatch.clock() if ended is None else ended)
        return result
