"""Tokens to experts and back: the protocol that the layer needs, and the dispatcher of a single rank.

A dispatcher has two linear operations, each the adjoint of the other:

- *dispatch* copies each token (and the weight of each choice) to the rows of its K expert slots;
- *combine* adds each token's K rows up again.

So the backward of dispatch is combine and the backward of combine is dispatch, and a dispatcher implements only the
two, as ``start`` calls that return a handle, without autograd.  This module wraps them for autograd once, for all.

The routing weight travels with its token and is applied inside the expert (see ``kernels/swiglu.py``), so combine is a
plain sum that may be taken in parts on the way.  It adds in FP32 at least, over the choices in the order the router
made them, and rounds once, so that one rank and many ranks compute the same.

A recipe may have tokens travel in FP8 [V3 section 3.3.3]: forward in dispatch, and their gradients in the backward of
combine.  They are quantised before they are sent, whether they go far or stay, and what arrives goes into the experts'
products as it is.  What is summed on the way, in combine and in the backward of dispatch, is not quantised.

Legend: T tokens, D model, K chosen experts, A = T·K rows sorted by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.kernels.row_sums import row_sums
from abyssal.precision.wire import pack, unpack
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat

Source = TypeVar("Source")
Target = TypeVar("Target")
Result = TypeVar("Result", covariant=True)


class Handle(Protocol[Result]):
    """Communication under way."""

    def wait(self) -> Result: ...


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A handle whose result is there already."""

    result: Result

    def wait(self) -> Result:
        return self.result


class DispatchPlan(Protocol):
    """Where each row goes; made once a layer from the routing, used by dispatch, combine and both backwards.

    What else it holds is the dispatcher's own, and a plan is of use to the dispatcher that made it alone.
    """

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each local expert slot; where other ranks send rows, this waits for their counts."""
        ...


@dataclass(frozen=True)
class LocalPlan:
    """Of a single rank."""

    counts: Sequence[int]
    order_A: Tensor
    """Flat index (token · K + choice) of each sorted row."""
    inverse_A: Tensor
    """Sorted row of each flat index."""
    top_k: int


class Dispatcher(Protocol):
    """How tokens reach experts.

    ``plan`` is one that this dispatcher made.  Tensors that are given are read until the handle has been waited for:
    until then they must neither change nor be forgotten.
    """

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        """Map the logical expert ids of ``layer`` to slots and decide where each row goes."""
        ...

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any
    ) -> Handle[tuple[Tensor, Tensor | None]]:
        """Rows (A, D) sorted by local slot, and each row's weight (A,) when weights are given."""
        ...

    def start_combine(
        self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any
    ) -> Handle[tuple[Tensor, Tensor | None]]:
        """The sum of each token's rows (T, D), and each row's weight back in its place (T, K)."""
        ...


class SlotMap:
    """Logical experts to physical slots.  A replicated expert's tokens take its replicas in turn.

    Args:
        first_turn: the replica with which token 0 begins; ranks begin with different ones, so that the few tokens of
            each do not all choose the same.
    """

    def __init__(self, placement: Placement, device: torch.device | str | None = None, first_turn: int = 0) -> None:
        self._first_turn = first_turn
        replicas = placement.replica_table()
        longest = max(len(slots) for slots in replicas)
        padded = [[slots[i % len(slots)] for i in range(longest)] for slots in replicas]
        self.num_slots = placement.num_slots
        self._slots_ER = torch.tensor(padded, device=device)
        self._counts_E = torch.tensor([len(slots) for slots in replicas], device=device)
        self.is_identity = placement.is_identity

    def __call__(self, expert_ids_TK: Tensor) -> Tensor:
        """(T, K) physical slots; token t takes replica ``first_turn + t`` modulo the number of replicas."""
        if self.is_identity:
            return expert_ids_TK
        turns = self._first_turn, self._first_turn + len(expert_ids_TK)
        turns_T1 = torch.arange(*turns, device=expert_ids_TK.device)[:, None]
        return self._slots_ER[expert_ids_TK, turns_T1 % self._counts_E[expert_ids_TK]]


class LocalDispatcher:
    """All experts on this rank: dispatch is a gather of rows, combine a sum of K rows.

    Args:
        placements: the placement of each MoE layer's experts.
    """

    def __init__(self, placements: Mapping[int, Placement], device: torch.device | str | None = None) -> None:
        self.placements = dict(placements)
        self.device = device
        self._slot_maps = {layer: SlotMap(placement, device) for layer, placement in placements.items()}

    def is_identity(self, layer: int) -> bool:
        """Whether every logical expert of ``layer`` has the slot of its number and no other."""
        return self._slot_maps[layer].is_identity

    def plan(self, layer: int, expert_ids_TK: Tensor) -> LocalPlan:
        slot_map = self._slot_maps[layer]
        slots_A = slot_map(expert_ids_TK).flatten()
        order_A = slots_A.argsort(stable=True)
        inverse_A = torch.empty_like(order_A)
        inverse_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        counts = torch.bincount(slots_A, minlength=slot_map.num_slots).tolist()
        return LocalPlan(counts, order_A, inverse_A, expert_ids_TK.shape[1])

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, plan: LocalPlan
    ) -> Done[tuple[Tensor, Tensor | None]]:
        rows_AD = x_TD.index_select(0, plan.order_A // plan.top_k)
        weights_A = None if weights_TK is None else weights_TK.flatten().index_select(0, plan.order_A)
        return Done((rows_AD, weights_A))

    def start_combine(
        self, rows_AD: Tensor, weights_A: Tensor | None, plan: LocalPlan
    ) -> Done[tuple[Tensor, Tensor | None]]:
        sum_TD = row_sums(rows_AD, plan.inverse_A.view(-1, plan.top_k))
        weights_TK = None if weights_A is None else weights_A.index_select(0, plan.inverse_A).view(-1, plan.top_k)
        return Done((sum_TD, weights_TK))


@dataclass(frozen=True)
class Then(Generic[Source, Target]):
    """A handle whose result is made from another's."""

    handle: Handle[Source]
    function: Callable[[Source], Target]

    def wait(self) -> Target:
        return self.function(self.handle.wait())


@dataclass(frozen=True)
class Rows:
    """What dispatch brought to the experts of this rank."""

    values_AD: Tensor
    """In the dtype in which the tokens were given."""
    weights_A: Tensor | None
    codes: Quantised | None = None
    """As they travelled, when they did so in FP8."""


def start_dispatch(
    dispatcher: Dispatcher, x_TD: Tensor, weights_TK: Tensor | None, plan: DispatchPlan, wire: TileFormat | None
) -> Handle[Rows]:
    """Dispatch in the format of the wire, without autograd: with one, each token is quantised and travels as bytes."""
    if wire is None:
        return Then(dispatcher.start_dispatch(x_TD, weights_TK, plan), lambda sent: Rows(*sent))

    def arrived(sent: tuple[Tensor, Tensor | None]) -> Rows:
        codes = unpack(sent[0], x_TD.shape[1], wire)
        return Rows(codes.values(x_TD.dtype), sent[1], codes)

    return Then(dispatcher.start_dispatch(pack(quantise(x_TD, wire)), weights_TK, plan), arrived)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        plan: DispatchPlan,
        dispatcher: Dispatcher,
        wire: TileFormat | None,
        arrived: list[Rows],
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.dispatcher = plan, dispatcher
        rows = start_dispatch(dispatcher, x_TD, weights_TK, plan, wire).wait()
        assert rows.weights_A is not None
        arrived.append(rows)
        return rows.values_AD, rows.weights_A

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dweights_TK = ctx.dispatcher.start_combine(gradients[0], gradients[1], ctx.plan).wait()
        return dx_TD, dweights_TK, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_AD: Tensor, plan: DispatchPlan, dispatcher: Dispatcher, wire: TileFormat | None
    ) -> Tensor:
        ctx.plan, ctx.dispatcher, ctx.wire = plan, dispatcher, wire
        return dispatcher.start_combine(rows_AD, None, plan).wait()[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows = start_dispatch(ctx.dispatcher, gradients[0], None, ctx.plan, ctx.wire).wait()
        return rows.values_AD, None, None, None


def dispatch(
    x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, dispatcher: Dispatcher, wire: TileFormat | None = None
) -> Rows:
    """Dispatch under autograd, waiting for the result."""
    if not torch.is_grad_enabled():
        return start_dispatch(dispatcher, x_TD, weights_TK, plan, wire).wait()
    arrived: list[Rows] = []
    values_AD, weights_A = _Dispatch.apply(x_TD, weights_TK, plan, dispatcher, wire, arrived)  # type: ignore[misc]
    return Rows(values_AD, weights_A, arrived[0].codes)


def combine(rows_AD: Tensor, plan: DispatchPlan, dispatcher: Dispatcher, wire: TileFormat | None = None) -> Tensor:
    """Combine under autograd, waiting for the result: (T, D)."""
    if not torch.is_grad_enabled():
        return dispatcher.start_combine(rows_AD, None, plan).wait()[0]
    return _Combine.apply(rows_AD, plan, dispatcher, wire)  # type: ignore[no-any-return]
