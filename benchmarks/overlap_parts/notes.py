"""What a rank did and when: works and moves on its main thread, communication on its other; for tables and traces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from abyssal.model.dispatch import Dispatcher, DispatchPlan, Handle
from abyssal.parallel.pipeline.chunk import Chunk, ModelChunk
from abyssal.parallel.pipeline.executor import Pair
from abyssal.parallel.pipeline.interleaving import Interleaving, Placed

from .replay import Sent, which

Result = TypeVar("Result", covariant=True)
Note = tuple[str, float, float]
"""What, when it began, when it ended, by ``time.perf_counter``, which is one clock for all ranks of a machine."""


@dataclass
class Notes:
    """Of one step."""

    works: list[Note] = field(default_factory=list)
    """Works and pairs."""
    moves: list[Note] = field(default_factory=list)
    """Of pairs that are interleaved."""
    sent: list[Note] = field(default_factory=list)
    """Communication, from its start by the main thread to its end."""

    def clear(self) -> None:
        for notes in (self.works, self.moves, self.sent):
            notes.clear()

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.works.append((what, began, time.perf_counter()))


class NotedChunk(ModelChunk):
    """Notes its works; a pair's works are noted as one by :class:`NotedPair`."""

    notes: Notes | None = None

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        with self._noted("F", micro_batch):
            return super().forward(micro_batch, x_TD)

    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        with self._noted("I", micro_batch):
            return super().backward_input(micro_batch, gradient_TD)

    def backward_weight(self, micro_batch: int) -> None:
        with self._noted("W", micro_batch):
            super().backward_weight(micro_batch)

    @contextmanager
    def _noted(self, kind: str, micro_batch: int) -> Iterator[None]:
        assert self.notes is not None
        with self.notes.work(f"{kind} of stage {self.stage}, micro-batch {micro_batch}"):
            yield


class NotedPair:
    """A pair, noted as one."""

    def __init__(self, pair: Pair, notes: Notes) -> None:
        self._pair, self._notes = pair, notes

    def __call__(
        self, ahead: Chunk, forward: int, x_TD: Tensor | None, back: Chunk, backward: int, gradient_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        with self._notes.work(f"pair: F of stage {ahead.stage}, {forward}; B of stage {back.stage}, {backward}"):
            return self._pair(ahead, forward, x_TD, back, backward, gradient_TD)


class NotedInterleaving(Interleaving):
    """Notes its moves: whoever carries them out asks for the next when one is done."""

    def __init__(self, interleaving: Interleaving, notes: Notes) -> None:
        super().__init__(interleaving.name, interleaving.instructions)
        object.__setattr__(self, "_notes", notes)

    def unrolled(self, num_forward: int, num_backward: int) -> Iterator[Placed]:
        notes: Notes = self.__dict__["_notes"]
        for one in super().unrolled(num_forward, num_backward):
            began = time.perf_counter()
            yield one
            notes.moves.append((f"{one.side} {one.move}", began, time.perf_counter()))


class NotedDispatcher:
    """Notes when communication began and ended."""

    def __init__(self, dispatcher: Dispatcher, notes: Notes) -> None:
        self._dispatcher, self._notes = dispatcher, notes

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        return self._dispatcher.plan(layer, expert_ids_TK)

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any) -> Handle[Sent]:
        began = time.perf_counter()
        handle = self._dispatcher.start_dispatch(x_TD, weights_TK, plan)
        return _Noted(handle, self._notes, which("dispatch", weights_TK), began)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any) -> Handle[Sent]:
        began = time.perf_counter()
        handle = self._dispatcher.start_combine(rows_AD, weights_A, plan)
        return _Noted(handle, self._notes, which("combine", weights_A), began)


class _Noted(Generic[Result]):
    """A lane's handle, which knows when it ended."""

    def __init__(self, handle: Handle[Result], notes: Notes, what: str, began: float) -> None:
        self._handle, self._notes, self._what, self._began = handle, notes, what, began
        self.ended: float | None = None

    def wait(self) -> Result:
        result = self._handle.wait()
        self.ended = ended = getattr(self._handle, "ended", None) or time.perf_counter()
        self._notes.sent.append((self._what, self._began, ended))
        return result
