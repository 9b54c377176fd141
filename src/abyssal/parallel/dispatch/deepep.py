"""DeepEP behind the dispatcher's protocol, where it is installed: kernels for NVLink and RDMA [DeepEP v2.1.0].

DeepEP copies a token once to every rank that holds one of its experts, with the slots and weights of its choices; the
rows of a slot are made here, and added up again in FP32 before a token's copy goes back.  So as with the hierarchical
dispatcher a BF16 sum is rounded once a rank and again where the library adds them.

Both of its interfaces are used: ``ElasticBuffer`` (version 2) where there is one, else ``Buffer`` (version 1).  The
library moves BF16, or FP8 codes beside FP32 scales.  A token in FP8 is a row of bytes here (``precision/wire.py``), so
dispatch sends it as BF16 that nobody computes with, filled up to the 16 bytes that the kernels copy at once.  Combine
adds, and takes BF16 alone.

How many rows arrive is known when the first dispatch of a plan has been done, not before: the library's layout is made
along with it.  Within a slot rows lie by their arrival, which the library does not promise to be that of one rank.

This has never run on a GPU.  It is tested against a stand-in with the library's signatures and checks.

Legend: T tokens, D model, K chosen experts, Q copies of tokens on this rank, A rows sorted by slot, R ranks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from abyssal.kernels.row_sums import row_sums
from abyssal.model.dispatch import SlotMap
from abyssal.parallel.dispatch.checks import check_placements, check_rows
from abyssal.parallel.dispatch.deepep_buffers import CopyBuffer, Received, open_buffer
from abyssal.parallel.dispatch.exchange import Peers
from abyssal.parallel.dispatch.hops import with_zero_row
from abyssal.parallel.dispatch.lane import Job, Lane
from abyssal.parallel.dispatch.links import LinkBytes, Traffic
from abyssal.parallel.dispatch.order import inverse, sorting
from abyssal.parallel.dispatch.routes import summands
from abyssal.parallel.mesh import Mesh
from abyssal.spec.placement import Placement

Sent = tuple[Tensor, Tensor | None]
COPIED_AT_ONCE = 16
"""Bytes: rows are a multiple of it."""


def load_deep_ep(device: torch.device) -> ModuleType:
    """The library.

    Raises:
        ValueError: no GPU, or it is not installed.
    """
    needs = (
        "DeepEP needs NVIDIA GPUs (Hopper or newer; Ampere for its older Buffer), NVLink inside a node, RDMA between "
        "nodes, PyTorch 2.10 and NCCL 2.30.4 or newer"
    )
    if device.type != "cuda":
        raise ValueError(
            f"dispatch is 'deepep' and tensors are on {device.type}: {needs}; give alltoall or hierarchical"
        )
    try:
        return importlib.import_module("deep_ep")
    except ImportError as error:
        raise ValueError(
            f"dispatch is 'deepep' and deep_ep cannot be imported ({error}): {needs}; build it from "
            "https://github.com/deepseek-ai/DeepEP, or give alltoall or hierarchical"
        ) from error


@dataclass(frozen=True)
class Arrival:
    """The copies of one plan on this rank, and the rows made of them."""

    received: Received
    counts: list[int]
    copies_R: list[int]
    """Copies that this rank sends to each rank."""
    choice_A: Tensor
    """Flat index (copy · K + choice) of each row sorted by slot."""
    sums_QW: Tensor
    """For each copy its rows, in the router's order."""


class DeepEPPlan:
    """Where each row goes; complete with its first dispatch."""

    def __init__(self, layer: int, slots_TK: Tensor, num_slots: int) -> None:
        self.layer = layer
        self.slots_TK = slots_TK
        self.num_slots = num_slots
        self.first: Job[tuple[Arrival, Tensor, Tensor]] | None = None

    @property
    def arrival(self) -> Arrival:
        """Waits for the first dispatch.

        Raises:
            ValueError: none was started.
        """
        if self.first is None:
            raise ValueError(f"plan of layer {self.layer}: DeepEP counts rows with a plan's first dispatch; start that")
        return self.first.wait()[0]

    @property
    def counts(self) -> Sequence[int]:
        return self.arrival.counts


@dataclass(frozen=True)
class _Dispatched:
    """The handle of a plan's first dispatch."""

    job: Job[tuple[Arrival, Tensor, Tensor]]
    weighted: bool

    def wait(self) -> Sent:
        _, rows_AD, weights_A = self.job.wait()
        return rows_AD, weights_A if self.weighted else None


class DeepEPDispatcher:
    """Experts spread over the ranks of ``mesh.experts``, reached by DeepEP's kernels.

    Args:
        placements: the placement of each MoE layer's experts, over as many ranks as the group has.
        library: of :func:`load_deep_ep`.

    Raises:
        ValueError: a placement over another number of ranks.
    """

    def __init__(self, placements: Mapping[int, Placement], mesh: Mesh, library: ModuleType | Any) -> None:
        self.traffic = Traffic()
        self._mesh = mesh
        self._library = library
        self._peers = Peers(mesh.experts, mesh.spec)
        self._buffer: CopyBuffer | None = None
        self._lane = Lane(mesh.device)
        self.place(placements)

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Plan with ``placements`` from now on.  Plans made before keep theirs."""
        check_placements(placements, self._peers.size)
        self.placements = dict(placements)
        self._slot_maps = {
            layer: SlotMap(placement, self._mesh.device, self._peers.rank) for layer, placement in placements.items()
        }

    def close(self) -> None:
        """End the dispatcher's thread and let go of the buffer."""
        self._lane.close()
        self._buffer = None

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DeepEPPlan:
        return DeepEPPlan(layer, self._slot_maps[layer](expert_ids_TK), self.placements[layer].num_slots)

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: DeepEPPlan) -> Job[Sent] | _Dispatched:
        """As the protocol says; weights travel with a plan's first dispatch alone.

        Raises:
            ValueError: tokens that are neither BF16 nor bytes, weights with a later dispatch, or other tokens than the
                plan's.
        """
        check_rows("tokens", len(x_TD), len(plan.slots_TK))
        if x_TD.dtype not in (torch.bfloat16, torch.uint8):
            raise ValueError(f"tokens are of {x_TD.dtype}: DeepEP moves BF16 and FP8; give alltoall or hierarchical")
        doing, counted = f"dispatch of layer {plan.layer}", self.traffic.dispatch
        if plan.first is None:
            plan.first = self._lane.submit(doing, lambda: self._dispatch_first(x_TD, weights_TK, plan, counted))
            return _Dispatched(plan.first, weights_TK is not None)
        if weights_TK is not None:
            raise ValueError(f"{doing}: weights travel with a plan's first dispatch; plan anew")

        def again() -> Sent:
            assert self._buffer is not None
            arrival = plan.arrival
            copies = self._buffer.dispatch_again(as_bf16(x_TD), arrival.received.handle)
            self._count(counted, arrival.copies_R, x_TD.shape[1] * x_TD.element_size())
            return _rows(copies, arrival, x_TD), None

        return self._lane.submit(doing, again)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: DeepEPPlan) -> Job[Sent]:
        """As the protocol says; ValueError for rows that are not BF16 or not the plan's."""
        if rows_AD.dtype != torch.bfloat16:
            raise ValueError(f"rows are of {rows_AD.dtype}: DeepEP adds BF16 alone; give alltoall or hierarchical")
        if rows_AD.shape[1] * 2 % COPIED_AT_ONCE:
            raise ValueError(
                f"rows are {rows_AD.shape[1]} wide: DeepEP adds {COPIED_AT_ONCE // 2} at once; give another dispatch"
            )
        check_rows("rows", len(rows_AD), sum(plan.counts))
        counted = self.traffic.combine

        def send() -> Sent:
            assert self._buffer is not None
            arrival = plan.arrival
            weights_QK = None
            if weights_A is not None:
                weights_QK = weights_A.new_zeros(len(arrival.sums_QW), plan.slots_TK.shape[1], dtype=torch.float32)
                weights_QK.view(-1)[arrival.choice_A] = weights_A.float()
            sums_QD = row_sums(with_zero_row(rows_AD), arrival.sums_QW)
            sum_TD, back_TK = self._buffer.combine(sums_QD, weights_QK, arrival.received.handle)
            self._count(counted, arrival.copies_R, rows_AD.shape[1] * rows_AD.element_size())
            return sum_TD, None if weights_A is None or back_TK is None else back_TK.to(weights_A.dtype)

        return self._lane.submit(f"combine of layer {plan.layer}", send)

    def _dispatch_first(
        self, x_TD: Tensor, weights_TK: Tensor | None, plan: DeepEPPlan, counted: LinkBytes
    ) -> tuple[Arrival, Tensor, Tensor]:
        if self._buffer is None:
            self._buffer = self._open(x_TD, plan)
        slots_TK = plan.slots_TK.to(getattr(self._library, "topk_idx_t", torch.int64)).contiguous()
        sent_TK = torch.zeros(slots_TK.shape, device=x_TD.device) if weights_TK is None else weights_TK.float()
        received = self._buffer.dispatch(as_bf16(x_TD), slots_TK, sent_TK.contiguous(), plan.num_slots)
        arrival = self._arrived(received, plan)
        self._count(counted, arrival.copies_R, x_TD.shape[1] * x_TD.element_size())
        weights_A = received.weights_QK.flatten().index_select(0, arrival.choice_A)
        weights_A = weights_A if weights_TK is None else weights_A.to(weights_TK.dtype)
        return arrival, _rows(received.copies, arrival, x_TD), weights_A

    def _open(self, x_TD: Tensor, plan: DeepEPPlan) -> CopyBuffer:
        """A buffer for as many tokens as any rank has now."""
        most = torch.tensor([len(x_TD)], device=x_TD.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, self._mesh.experts)
        width = x_TD.shape[1] + -x_TD.shape[1] % COPIED_AT_ONCE  # of bytes: room for twice, as combine sends BF16
        return open_buffer(self._library, self._mesh.experts, int(most), width, plan.slots_TK.shape[1])

    def _arrived(self, received: Received, plan: DeepEPPlan) -> Arrival:
        slots_per_rank = plan.num_slots // self._peers.size
        slots_QK = received.slots_QK.long()
        copy_E, choice_E = (slots_QK >= 0).nonzero(as_tuple=True)
        slot_E = slots_QK[copy_E, choice_E]
        order_A = sorting(slot_E, slots_per_rank)
        choice_A = (copy_E * slots_QK.shape[1] + choice_E).index_select(0, order_A)
        counts = torch.bincount(slot_E, minlength=slots_per_rank).tolist()
        hit_TR = torch.zeros(len(plan.slots_TK), self._peers.size, dtype=torch.bool, device=slots_QK.device)
        hit_TR.scatter_(1, plan.slots_TK // slots_per_rank, True)
        sums_QW = summands(copy_E, len(slots_QK), inverse(order_A))
        return Arrival(received, counts, hit_TR.sum(0).tolist(), choice_A, sums_QW)

    def _count(self, counted: LinkBytes, copies_R: list[int], size: int) -> None:
        """By the rank for which a copy is; over which links the library takes it there is not seen."""
        counted.add([copies * size for copies in copies_R], self._peers.nodes, self._peers.rank)


def as_bf16(x_TD: Tensor) -> Tensor:
    """The bytes of each row read as BF16, filled up to a multiple of :data:`COPIED_AT_ONCE`."""
    size = x_TD.shape[1] * x_TD.element_size()
    if x_TD.dtype == torch.bfloat16 and size % COPIED_AT_ONCE == 0:
        return x_TD.contiguous()
    return functional.pad(x_TD.contiguous().view(torch.uint8), (0, -size % COPIED_AT_ONCE)).view(torch.bfloat16)


def _rows(copies: Tensor, arrival: Arrival, like_TD: Tensor) -> Tensor:
    """(A, D): the rows of each slot, as they were before :func:`as_bf16`."""
    copy_A = arrival.choice_A // arrival.received.slots_QK.shape[1]
    rows = copies.index_select(0, copy_A).view(torch.uint8)
    size = like_TD.shape[1] * like_TD.element_size()
    return rows[:, :size].contiguous().view(like_TD.dtype)
