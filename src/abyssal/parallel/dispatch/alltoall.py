"""Plain expert parallelism: every row goes straight to the rank of its slot, one all-to-all each way.

A token travels once for each of its K choices, so two choices on one rank or node cost twice; the hierarchical
dispatcher sends it once a node.  In exchange each choice's row comes back by itself and is added by the token's own
rank in the router's order, so that the sum has the bits of one rank alone, in any dtype.

The counts of rows are exchanged as soon as the plan is made.  Rows arrive by source rank and, from each, by slot and
token; they are put in order of slot, source rank and token, which is the order of one rank that had all the tokens.
Weights go in a message of their own beside that of the rows: to put both into one, all rows would be copied twice.

Legend: T tokens, D model (or bytes of a token), K chosen experts, A rows, sent or received; R ranks, E local slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.row_sums import row_sums
from abyssal.model.dispatch import Handle, SlotMap
from abyssal.parallel.dispatch.checks import check_fingerprints, check_placements, check_rows, fingerprint
from abyssal.parallel.dispatch.exchange import Peers
from abyssal.parallel.dispatch.lane import Lane
from abyssal.parallel.dispatch.links import LinkBytes, Traffic
from abyssal.parallel.dispatch.order import inverse, runs, sorting, take
from abyssal.parallel.mesh import Mesh
from abyssal.spec.placement import Placement

Sent = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Arrival:
    """What a rank receives: known when all ranks have said what they send."""

    counts: list[int]
    """Rows of each local slot."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    order_A: Tensor
    """Place among the arrivals of each row sorted by slot."""
    inverse_A: Tensor


@dataclass(frozen=True)
class AllToAllPlan:
    """Where each row goes."""

    layer: int
    order_A: Tensor
    """Flat index (token · K + choice) of each row as it is sent: by slot, and so by rank."""
    inverse_A: Tensor
    top_k: int
    arrival: Handle[Arrival]

    @property
    def counts(self) -> Sequence[int]:
        return self.arrival.wait().counts

    @property
    def num_tokens(self) -> int:
        return len(self.order_A) // self.top_k


class AllToAllDispatcher:
    """Experts spread over the ranks of ``mesh.experts``, each reached directly.

    All ranks of the group plan and start in the same order.  While anything is under way nobody else may use the group.

    Args:
        placements: the placement of each MoE layer's experts, over as many ranks as the group has.

    Raises:
        ValueError: a placement over another number of ranks.
    """

    def __init__(self, placements: Mapping[int, Placement], mesh: Mesh) -> None:
        self.traffic = Traffic()
        self._peers = Peers(mesh.experts, mesh.spec)
        self._device = mesh.device
        self._lane = Lane(mesh.device)
        self.place(placements)

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Plan with ``placements`` from now on.  Plans made before keep theirs."""
        check_placements(placements, self._peers.size)
        self.placements = dict(placements)
        self._slot_maps = {
            layer: SlotMap(placement, self._device, self._peers.rank) for layer, placement in placements.items()
        }

    def close(self) -> None:
        """End the dispatcher's thread."""
        self._lane.close()

    def plan(self, layer: int, expert_ids_TK: Tensor) -> AllToAllPlan:
        slot_map = self._slot_maps[layer]
        slots_A = slot_map(expert_ids_TK).flatten()
        order_A = sorting(slots_A, slot_map.num_slots)
        counts_RE = torch.bincount(slots_A, minlength=slot_map.num_slots).view(self._peers.size, -1)
        own = fingerprint(layer, self.placements[layer], expert_ids_TK.shape[1])
        counted = self.traffic.plan
        arrival = self._lane.submit(f"plan of layer {layer}", lambda: self._announce(counts_RE, own, counted))
        return AllToAllPlan(layer, order_A, inverse(order_A), expert_ids_TK.shape[1], arrival)

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: AllToAllPlan) -> Handle[Sent]:
        """As the protocol says; ValueError for other tokens than the plan's."""
        check_rows("tokens", len(x_TD), plan.num_tokens)
        counted = self.traffic.dispatch

        def send() -> Sent:
            rows_AD = x_TD.index_select(0, plan.order_A // plan.top_k)
            weights_A = None if weights_TK is None else weights_TK.flatten().index_select(0, plan.order_A)
            arrival = plan.arrival.wait()
            rows_AD, weights_A = self._travel(rows_AD, weights_A, arrival.sent, arrival.received, counted)
            return take(rows_AD, weights_A, arrival.order_A)

        return self._lane.submit(f"dispatch of layer {plan.layer}", send)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: AllToAllPlan) -> Handle[Sent]:
        """As the protocol says; ValueError for other rows than the plan's."""
        check_rows("rows", len(rows_AD), sum(plan.counts))
        counted = self.traffic.combine

        def send() -> Sent:
            arrival = plan.arrival.wait()
            rows, weights = take(rows_AD, weights_A, arrival.inverse_A)
            rows, weights = self._travel(rows, weights, arrival.received, arrival.sent, counted)
            sum_TD = row_sums(rows, plan.inverse_A.view(-1, plan.top_k))
            weights_TK = None if weights is None else weights.index_select(0, plan.inverse_A).view(-1, plan.top_k)
            return sum_TD, weights_TK

        return self._lane.submit(f"combine of layer {plan.layer}", send)

    def _announce(self, counts_RE: Tensor, own: int, counted: LinkBytes) -> Arrival:
        """Tell each rank how many rows its slots get from here."""
        ones = [1] * self._peers.size
        message = torch.cat([counts_RE, counts_RE.new_full((len(counts_RE), 1), own)], 1)
        received, work = self._peers.exchange(message, ones, ones, counted)
        sent_R = counts_RE.sum(1)
        if work is not None:
            work.wait()
        check_fingerprints(own, received[:, -1].tolist())
        received_RE = received[:, :-1]
        sorted_A = _places_by_slot(received_RE)
        counts, from_R = received_RE.sum(0).tolist(), received_RE.sum(1).tolist()
        return Arrival(counts, sent_R.tolist(), from_R, inverse(sorted_A), sorted_A)

    def _travel(
        self, rows_AD: Tensor, weights_A: Tensor | None, sent: list[int], received: list[int], counted: LinkBytes
    ) -> Sent:
        rows, rows_work = self._peers.exchange(rows_AD, sent, received, counted)
        weights, weights_work = weights_A, None
        if weights_A is not None:
            weights, weights_work = self._peers.exchange(weights_A, sent, received, counted)
        for work in (rows_work, weights_work):
            if work is not None:
                work.wait()
        return rows, weights


def _places_by_slot(counts_RE: Tensor) -> Tensor:
    """Of rows that lie by rank and slot, each one's place in order of slot and rank: its run moves as a whole."""
    counts_ER = counts_RE.t()
    begins_ER = (counts_ER.flatten().cumsum(0) - counts_ER.flatten()).view_as(counts_ER)
    begins_RE = (counts_RE.flatten().cumsum(0) - counts_RE.flatten()).view_as(counts_RE)
    moves_A = runs((begins_ER.t() - begins_RE).flatten(), counts_RE.flatten())
    return torch.arange(len(moves_A), device=moves_A.device) + moves_A
