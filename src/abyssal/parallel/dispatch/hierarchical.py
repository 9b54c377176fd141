"""Node-limited expert parallelism in two hops: a token crosses to a node once [V3 section 3.2.2].

A token first crosses to the rank of the sender's index on every node that holds one of its experts (``mesh.across``),
once a node, and is handed on from there inside the node (``mesh.inside``), once to every rank that holds one of them;
the rank of the experts then copies it to the rows of its slots.  V3's router chooses experts on at most four nodes, so
eight choices cost at most four crossings of the slow link.

Combine is the reverse.  The rows of one token are added up at the rank of the experts, then at the rank that handed it
on, then at its own, so one row a token and node crosses.  Each of these sums is taken in FP32 at least and rounded
where it leaves: a BF16 row is rounded up to three times on its way, where one rank alone rounds once, and choices are
added in another order (within a rank in the router's order, then by rank, then by node).  So the result is the local
one but for the last bits; when all of a token's experts are on one rank it has the same bits.  Weights and their
gradients are never added and come back as they are.

What travels in dispatch are the bytes that it is given: FP8 where the recipe quantises tokens.

Tokens are cut into chunks, and one crosses while the one before is handed on.  The size of a chunk changes no bits; it
is measured with the first tokens that are many enough to be cut (``dispatch/tune.py``) unless it is given.

The trade-off not taken: the sum of a node's partial sums in FP32 on the way, twice the bytes.

Legend: T tokens, D model (or bytes of a token), K chosen experts, A rows sorted by slot, E choices, Q copies held,
W summands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.row_sums import row_sums
from abyssal.model.dispatch import Handle, SlotMap
from abyssal.parallel.dispatch.checks import check_placements, check_rows, fingerprint
from abyssal.parallel.dispatch.exchange import Peers
from abyssal.parallel.dispatch.hops import Hop, open_hop, travel_back, travel_out, with_zero_row
from abyssal.parallel.dispatch.lane import Lane
from abyssal.parallel.dispatch.links import LinkBytes, Traffic
from abyssal.parallel.dispatch.order import inverse, sorting
from abyssal.parallel.dispatch.routed import RoutedPlan
from abyssal.parallel.dispatch.routes import Held, chunk_size, summands, tokens_held
from abyssal.parallel.dispatch.tune import ChunkSize, measure, worth_measuring
from abyssal.parallel.mesh import Mesh
from abyssal.spec.placement import Placement

Sent = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Route:
    """Both hops, and the rows at the experts; known when all ranks have said what they send."""

    across: Hop
    inside: Hop
    counts: list[int]
    """Rows of each local slot."""
    order_A: Tensor
    """Place among the choices that arrived of each row sorted by slot."""
    inverse_A: Tensor
    copy_A: Tensor
    """Row of the buffer that holds the token of each row."""
    sums_QW: Tensor
    """For each row of that buffer its rows at the experts, in the router's order."""


class HierarchicalDispatcher:
    """Experts spread over the ranks of ``mesh.experts``, reached by ``mesh.across`` and then ``mesh.inside``.

    All ranks of the expert group plan and start in the same order.  While anything is under way nobody else may use
    these groups.

    Args:
        placements: the placement of each MoE layer's experts, over as many ranks as the expert group has.
        chunk_tokens: how many of a rank's tokens cross at once; None: found by measurement, at the first
            dispatch of tokens enough to be cut, and until then all at once.

    Attributes:
        chunk_size: what was measured; None before, or where nothing was.

    Raises:
        ValueError: a placement over another number of ranks or of too many slots, or chunks of no token.
    """

    def __init__(self, placements: Mapping[int, Placement], mesh: Mesh, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}: give 1 or more, or None to have it measured")
        self.traffic = Traffic()
        self.chunk_size: ChunkSize | None = None
        self._mesh = mesh
        self._across, self._inside = Peers(mesh.across, mesh.spec), Peers(mesh.inside, mesh.spec)
        # From here on these two are the lane's thread's alone, which is at the same point on all ranks.
        self._chunk_tokens = chunk_tokens
        self._untried = chunk_tokens is None and min(self._across.size, self._inside.size) > 1
        self._lane = Lane(mesh.device)
        self.place(placements)

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Plan with ``placements`` from now on.  Plans made before keep theirs."""
        check_placements(placements, self._across.size * self._inside.size, self._inside.size)
        self.placements = dict(placements)
        self._slot_maps = {
            layer: SlotMap(placement, self._mesh.device, self._mesh.place.expert)
            for layer, placement in placements.items()
        }

    def close(self) -> None:
        """End the dispatcher's thread."""
        self._lane.close()

    def plan(self, layer: int, expert_ids_TK: Tensor) -> RoutedPlan[Route]:
        slots_TK = self._slot_maps[layer](expert_ids_TK)
        own = fingerprint(layer, self.placements[layer], expert_ids_TK.shape[1])
        slots_per_rank, counted = self.placements[layer].slots_per_rank, self.traffic.plan

        def find() -> Route:
            return self._find_route(slots_TK, slots_per_rank, own, self._chunk_tokens, counted)

        return RoutedPlan[Route](layer, slots_TK, self._lane.submit(f"plan of layer {layer}", find))

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, plan: RoutedPlan[Route]) -> Handle[Sent]:
        """As the protocol says; ValueError for other tokens than the plan's."""
        check_rows("tokens", len(x_TD), len(plan.slots_TK))
        counted = self.traffic.dispatch

        def send() -> Sent:
            route = plan.route.wait()
            if self._untried and worth_measuring(route.inside.most_tokens):
                self._untried = False
                self._measure(x_TD, plan, route.inside.most_tokens)
            return _dispatch(route, x_TD, weights_TK, counted)

        return self._lane.submit(f"dispatch of layer {plan.layer}", send)

    def start_combine(self, rows_AD: Tensor, weights_A: Tensor | None, plan: RoutedPlan[Route]) -> Handle[Sent]:
        """As the protocol says; ValueError for other rows than the plan's."""
        check_rows("rows", len(rows_AD), sum(plan.counts))
        counted = self.traffic.combine

        def send() -> Sent:
            sum_TD, back = _combine(plan.route.wait(), rows_AD, weights_A, counted)
            return sum_TD, None if back is None else back.view_as(plan.slots_TK)

        return self._lane.submit(f"combine of layer {plan.layer}", send)

    def _find_route(
        self, slots_TK: Tensor, slots: int, own: int, chunk_tokens: int | None, counted: LinkBytes
    ) -> Route:
        nodes, ranks, tokens = self._across.size, self._inside.size, len(slots_TK)
        chunks = max(-(-tokens // chunk_size(tokens, chunk_tokens)), 1)
        held = tokens_held(slots_TK, chunk_tokens)
        across, held = open_hop(self._across, held, ranks * slots, 1, chunks, tokens, own, counted)
        chunks, tokens = across.num_chunks, across.most_tokens
        inside, held = open_hop(self._inside, held, slots, nodes, chunks, tokens, own, counted)
        return _at_experts(across, inside, held, slots)

    def _measure(self, x_TD: Tensor, plan: RoutedPlan[Route], most_tokens: int) -> None:
        """Find the size of chunks for the plans to come, with these tokens; on the lane's thread."""
        slots_per_rank, uncounted = len(plan.counts), LinkBytes()

        def trial(chunk_tokens: int) -> None:
            route = self._find_route(plan.slots_TK, slots_per_rank, plan.layer, chunk_tokens, uncounted)
            rows_AD, _ = _dispatch(route, x_TD, None, uncounted)
            _combine(route, rows_AD if rows_AD.is_floating_point() else rows_AD.bfloat16(), None, uncounted)

        self.chunk_size = measure(trial, most_tokens, self._mesh.experts, self._mesh.device)
        self._chunk_tokens = self.chunk_size.tokens


def _dispatch(route: Route, x_TD: Tensor, weights_TK: Tensor | None, counted: LinkBytes) -> Sent:
    weights_E = None if weights_TK is None else weights_TK.flatten()
    copies, weights_E = travel_out(route.across, route.inside, x_TD, weights_E, counted)
    weights_A = None if weights_E is None else weights_E.index_select(0, route.order_A)
    return copies.index_select(0, route.copy_A), weights_A


def _combine(route: Route, rows_AD: Tensor, weights_A: Tensor | None, counted: LinkBytes) -> Sent:
    """The weights come back flat."""
    weights_E = None if weights_A is None else weights_A.index_select(0, route.inverse_A)
    parts = with_zero_row(rows_AD) if route.sums_QW.shape[1] > 1 else rows_AD

    def sums(copies: slice) -> Tensor:
        return row_sums(parts, route.sums_QW[copies])

    return travel_back(route.across, route.inside, sums, rows_AD, weights_E, counted)


def _at_experts(across: Hop, inside: Hop, held: Held, num_slots: int) -> Route:
    """Copies at the rank of their experts, each choice a row, in order of slot, source rank and token."""
    nodes, ranks = across.peers.size, inside.peers.size
    source_E = held.source_P.index_select(0, held.copy_E)  # by the rank that handed it on, then by its node of origin
    rank_E = source_E % nodes * ranks + source_E // nodes
    order_A = sorting(held.slot_E * (nodes * ranks) + rank_E, num_slots * nodes * ranks)
    inverse_A, place_E = inverse(order_A), held.place_P.index_select(0, held.copy_E)
    sums_QW = summands(place_E, len(held.place_P), inverse_A)
    counts = torch.bincount(held.slot_E, minlength=num_slots).tolist()
    return Route(across, inside, counts, order_A, inverse_A, place_E[order_A], sums_QW)
