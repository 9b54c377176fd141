"""Communication removed: what each dispatch and combine brought is kept once, and given again without being sent.

A step that is run on what was kept computes the same numbers, and waits for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from abyssal.model.dispatch import Dispatcher, DispatchPlan, Done, Handle, Then

Sent = tuple[Tensor, Tensor | None]
Key = tuple[int, int, str]
"""Micro-batch, layer, which of a layer's four."""


@dataclass
class Kept:
    """Of one step."""

    plans: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By micro-batch and layer."""
    sent: dict[Key, Sent] = field(default_factory=dict)


def which(what: str, weights: Tensor | None) -> str:
    """A layer's forward dispatches with weights and combines without; its backward does it the other way round."""
    forward = (weights is not None) == (what == "dispatch")
    return f"F {what}" if forward else f"B {'combine' if what == 'dispatch' else 'dispatch'}"


class Keeping:
    """The dispatcher of one micro-batch, which sends and keeps what comes."""

    def __init__(self, dispatcher: Dispatcher, kept: Kept, micro_batch: int) -> None:
        self._dispatcher, self._kept, self._micro_batch = dispatcher, kept, micro_batch

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        made = self._dispatcher.plan(layer, expert_ids_TK)
        self._kept.plans[self._micro_batch, layer] = made
        return made

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any) -> Handle[Sent]:
        handle = self._dispatcher.start_dispatch(x_TD, weights_TK, plan)
        return Then(handle, lambda sent: self._keep(plan, which("dispatch", weights_TK), sent))

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any) -> Handle[Sent]:
        handle = self._dispatcher.start_combine(rows_AD, weights_A, plan)
        return Then(handle, lambda sent: self._keep(plan, which("combine", weights_A), sent))

    def _keep(self, plan: Any, name: str, sent: Sent) -> Sent:
        self._kept.sent[self._micro_batch, plan.layer, name] = sent
        return sent


class Replaying:
    """The dispatcher of one micro-batch which gives what was kept."""

    def __init__(self, kept: Kept, micro_batch: int) -> None:
        self._kept, self._micro_batch = kept, micro_batch

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        del expert_ids_TK
        return self._kept.plans[self._micro_batch, layer]

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any) -> Handle[Sent]:
        del x_TD
        return Done(self._kept.sent[self._micro_batch, plan.layer, which("dispatch", weights_TK)])

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any) -> Handle[Sent]:
        del rows_AD
        return Done(self._kept.sent[self._micro_batch, plan.layer, which("combine", weights_A)])
