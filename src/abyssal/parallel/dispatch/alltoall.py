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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.row_sums import row_sums
from abyssal.model.dispatch import Handle, SlotMap
from abyssal.parallel.dispatch.checks import check_fingerprints, check_placements, check_rows, fingerprint
from abyssal.parallel.dispatch.exchange import Peers, finished, wait_for
from abyssal.parallel.dispatch.lane import Lane
from abyssal.parallel.dispatch.links import LinkBytes, Traffic
from abyssal.parallel.dispatch.order import inverse, runs, sorting, take
from abyssal.parallel.dispatch.routed import RoutedPlan
from abyssal.parallel.mesh import Mesh
from abyssal.spec.placement import Placement

Sent = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Route:
    """What leaves and what arrives; known when all ranks have said what they send."""

    counts: list[int]
    """Rows of each local slot."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    leaving_A: Tensor
    """Flat index (token · K + choice) of each row as it is sent: by slot, and so by rank."""
    returning_A: Tensor
    """Place among the rows sent of each flat index."""
    order_A: Tensor
    """Place among the arrivals of each row sorted by slot."""
    inverse_A: Tensor


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

    def plan(self, layer: int, expert_ids_TK: Tensor) -> RoutedPlan[Route]:
        slots_TK, placement, counted = self._slot_maps[layer](expert_ids_TK), self.placements[layer], self.traffic.plan
        own = fingerprint(layer, placement, expert_ids_TK.shape[1])

        def find() -> Route:
            return self._find_route(slots_TK.flatten(), placement.num_slots, own, counted)

        return RoutedPlan[Route](layer, slots_TK, self._lane.submit(f"plan of layer {layer}", find))

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: RoutedPlan[Route]) -> Handle[Sent]:
        """As the protocol says; ValueError for other tokens than the plan's."""
        check_rows("tokens", len(x_TD), len(plan.slots_TK))
        counted = self.traffic.dispatch

        def send() -> Sent:
            route = plan.route.wait()
            rows = x_TD.index_select(0, route.leaving_A // plan.slots_TK.shape[1])
            weights = None if weights_TK is None else weights_TK.flatten().index_select(0, route.leaving_A)
            rows, weights = self._travel(rows, weights, route.sent, route.received, counted)
            return take(rows, weights, route.order_A)

        return self._lane.submit(f"dispatch of layer {plan.layer}", send)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: RoutedPlan[Route]) -> Handle[Sent]:
        """As the protocol says; ValueError for other rows than the plan's."""
        check_rows("rows", len(rows_AD), sum(plan.counts))
        counted = self.traffic.combine

        def send() -> Sent:
            route = plan.route.wait()
            rows, weights = take(rows_AD, weights_A, route.inverse_A)
            rows, weights = self._travel(rows, weights, route.received, route.sent, counted)
            sum_TD = row_sums(rows, route.returning_A.view_as(plan.slots_TK))
            if weights is not None:
                weights = weights.index_select(0, route.returning_A).view_as(plan.slots_TK)
            return sum_TD, weights

        return self._lane.submit(f"combine of layer {plan.layer}", send)

    def _find_route(self, slots_A: Tensor, num_slots: int, own: int, counted: LinkBytes) -> Route:
        """Tell each rank how many rows its slots get from here, and learn how many come."""
        ranks = self._peers.size
        counts_RE = torch.bincount(slots_A, minlength=num_slots).view(ranks, -1)
        message = torch.cat([counts_RE, counts_RE.new_full((ranks, 1), own)], 1)
        answers, work = self._peers.exchange(message, [1] * ranks, [1] * ranks, counted)
        leaving_A = sorting(slots_A, num_slots)
        wait_for(work)
        check_fingerprints(own, answers[:, -1].tolist())
        received_RE = answers[:, :-1]
        sorted_A = _places_by_slot(received_RE)
        return Route(
            counts=received_RE.sum(0).tolist(),
            sent=counts_RE.sum(1).tolist(),
            received=received_RE.sum(1).tolist(),
            leaving_A=leaving_A,
            returning_A=inverse(leaving_A),
            order_A=inverse(sorted_A),
            inverse_A=sorted_A,
        )

    def _travel(
        self, rows_AD: Tensor, weights_A: Tensor | None, sent: list[int], received: list[int], counted: LinkBytes
    ) -> Sent:
        if weights_A is None:
            return finished(*self._peers.exchange(rows_AD, sent, received, counted)), None
        rows, weights, work = self._peers.exchange_both(rows_AD, weights_A, sent, received, counted)
        return finished((rows, weights), work)


def _places_by_slot(counts_RE: Tensor) -> Tensor:
    """Of rows that lie by rank and slot, each one's place in order of slot and rank: its run moves as a whole."""
    counts_ER = counts_RE.t()
    begins_ER = (counts_ER.flatten().cumsum(0) - counts_ER.flatten()).view_as(counts_ER)
    begins_RE = (counts_RE.flatten().cumsum(0) - counts_RE.flatten()).view_as(counts_RE)
    moves_A = runs((begins_ER.t() - begins_RE).flatten(), counts_RE.flatten())
    return torch.arange(len(moves_A), device=moves_A.device) + moves_A
