"""Between the slots that compute with an expert and the rank that is its home.

The optimizer's state of logical expert e lives on expert rank e·ep/E, wherever its slots are (as in SYMI,
arXiv 2504.19925).  Gradients go from slots to homes, where replicas' are added in the order of slots; new values go
from homes to slots.  So a placement may change between steps with nothing moved but what every step moves anyway, and
replicas cannot drift apart.  With one slot an expert, in order, slot and home are the same and nothing is sent.

Legend: S local slots, H experts at home here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from abyssal.parallel import all_to_all
from abyssal.parallel.waiting import Waiting
from abyssal.spec.placement import Placement


@dataclass(frozen=True)
class _Routes:
    """Of one layer: for each pair of ranks, which slots and experts go between them."""

    sent: list[list[int]]
    """By home rank, the local slots whose experts live there."""
    received: list[list[int]]
    """By slot rank, the experts of its slots that live here, in the order of its slots."""
    first: list[list[bool]]
    """Whether the slot is its expert's first, beside ``received``."""


def homes(num_experts: int, rank: int, num_ranks: int) -> range:
    """The experts that live on expert rank ``rank``."""
    each = num_experts // num_ranks
    return range(rank * each, (rank + 1) * each)


def _routes(placement: Placement, rank: int) -> _Routes:
    ranks, each = placement.num_ranks, placement.num_experts // placement.num_ranks
    own = placement.experts_of_rank(rank)
    first_slot = [slots[0] for slots in placement.replica_table()]
    sent = [[slot for slot, expert in enumerate(own) if expert // each == home] for home in range(ranks)]
    received, first = [], []
    for source in range(ranks):
        here = [
            (source * placement.slots_per_rank + slot, expert)
            for slot, expert in enumerate(placement.experts_of_rank(source))
            if expert // each == rank
        ]
        received.append([expert for _, expert in here])
        first.append([first_slot[expert] == slot for slot, expert in here])
    return _Routes(sent, received, first)


class Homes:
    """The exchange among the ranks of an expert group.

    Args:
        group: those ranks; nothing else is sent in it.
    """

    def __init__(self, group: distributed.ProcessGroup, waiting: Waiting) -> None:
        self._group, self._waiting = group, waiting
        self.rank, self.num_ranks = distributed.get_rank(group), distributed.get_world_size(group)

    def to_homes(
        self, stacked: Sequence[Tensor], placements: Sequence[Placement], first_only: bool = False
    ) -> list[Tensor]:
        """For each tensor of slots (S, ...) with its layer's placement: that of homes (H, ...), slots added up.

        Args:
            first_only: take an expert's first slot alone: for values, which are the same in all.
        """
        routes = [_routes(placement, self.rank) for placement in placements]
        parts = [
            [
                tensor[slots].reshape(-1)
                for tensor, route in zip(stacked, routes, strict=True)
                if (slots := route.sent[to])
            ]
            for to in range(self.num_ranks)
        ]
        sizes = [
            sum(len(route.received[source]) * tensor[0].numel() for tensor, route in zip(stacked, routes, strict=True))
            for source in range(self.num_ranks)
        ]
        arrived = self._exchange(parts, sizes, stacked[0])
        at_home = [
            tensor.new_zeros(placement.num_experts // placement.num_ranks, *tensor.shape[1:])
            for tensor, placement in zip(stacked, placements, strict=True)
        ]
        for source, message in enumerate(arrived):
            begin = 0
            for home, route, placement in zip(at_home, routes, placements, strict=True):
                lowest, size = homes(placement.num_experts, self.rank, self.num_ranks)[0], home[0].numel()
                for expert, is_first in zip(route.received[source], route.first[source], strict=True):
                    if is_first or not first_only:
                        home[expert - lowest] += message[begin : begin + size].view(home.shape[1:])
                    begin += size
        return at_home

    @torch.no_grad()
    def to_slots(self, at_home: Sequence[Tensor], stacked: Sequence[Tensor], placements: Sequence[Placement]) -> None:
        """Fill each tensor of slots (S, ...) from that of homes (H, ...)."""
        routes = [_routes(placement, self.rank) for placement in placements]
        parts: list[list[Tensor]] = []
        for to in range(self.num_ranks):
            wanted = []
            for home, route, placement in zip(at_home, routes, placements, strict=True):
                lowest = homes(placement.num_experts, self.rank, self.num_ranks)[0]
                if route.received[to]:
                    wanted.append(home[[expert - lowest for expert in route.received[to]]].reshape(-1))
            parts.append(wanted)
        sizes = [
            sum(len(route.sent[source]) * tensor[0].numel() for tensor, route in zip(stacked, routes, strict=True))
            for source in range(self.num_ranks)
        ]
        for source, message in enumerate(self._exchange(parts, sizes, at_home[0])):
            begin = 0
            for tensor, route in zip(stacked, routes, strict=True):
                size = tensor[0].numel()
                for slot in route.sent[source]:
                    tensor[slot].copy_(message[begin : begin + size].view(tensor.shape[1:]))
                    begin += size

    def _exchange(self, parts: list[list[Tensor]], sizes: list[int], like: Tensor) -> list[Tensor]:
        """Send each rank its parts as one message; what came from each, of ``sizes`` elements."""
        empty = like.new_empty(0)
        messages = [torch.cat(message) if message else empty for message in parts]
        arrived = like.new_empty(sum(sizes))
        with self._waiting:
            sent = [len(message) for message in messages]
            all_to_all.start([(arrived, torch.cat(messages))], sizes, sent, self._group).wait()
        return list(arrived.split(sizes))
