"""What the tests of dispatchers between ranks share: routings, and the single rank's answer to the same batch.

Every rank draws the tokens of all ranks, so that each can hold its own part to the dispatcher of a single rank over
the whole batch.  Its slots are numbered as the mesh's are, so its rows sorted by slot are theirs one after another.

Legend: T tokens, D model, K chosen experts, A rows sorted by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from abyssal.model.dispatch import LocalDispatcher, LocalPlan, SlotMap
from abyssal.spec.placement import Placement

LAYER = 3
WIDTH = 8


@dataclass(frozen=True)
class Batch:
    """Tokens of every rank of one expert group."""

    placement: Placement
    ids_TK: list[Tensor]
    x_TD: list[Tensor]
    weights_TK: list[Tensor]

    def slots_TK(self, rank: int) -> Tensor:
        return SlotMap(self.placement, first_turn=rank)(self.ids_TK[rank])

    def tokens(self, rank: int) -> slice:
        begin = sum(len(ids) for ids in self.ids_TK[:rank])
        return slice(begin, begin + len(self.ids_TK[rank]))


def draw(placement: Placement, kind: str, dtype: torch.dtype, seed: int, group: int = 0, width: int = WIDTH) -> Batch:
    """Routings by name: ``random``, ``one expert``, ``few experts``, ``repeated``, ``empty ranks`` or ``no tokens``."""
    generator = torch.Generator().manual_seed(1000 * group + seed)
    ids, x, weights = [], [], []
    for rank in range(placement.num_ranks):
        tokens = int(torch.randint(1, 12, (), generator=generator))
        if kind == "no tokens" or (kind == "empty ranks" and rank % 2 == 0):
            tokens = 0
        ids.append(_ids(placement.num_experts, kind, tokens, generator))
        x.append(torch.randn(tokens, width, dtype=torch.float64, generator=generator).to(dtype))
        weights.append(torch.rand(ids[-1].shape, generator=generator))
    return Batch(placement, ids, x, weights)


def _ids(num_experts: int, kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    if kind == "one expert":
        return torch.full((tokens, 1), num_experts - 1)
    if kind == "repeated":
        return torch.randint(0, num_experts, (tokens, 5), generator=generator)
    among = 3 if kind == "few experts" else num_experts
    return torch.rand(tokens, among, generator=generator).argsort(1)[:, :3]


@dataclass(frozen=True)
class Whole:
    """The answer of a single rank that holds every slot."""

    plan: LocalPlan
    rows_AD: Tensor
    weights_A: Tensor
    dispatcher: LocalDispatcher

    def rows(self, batch: Batch, rank: int) -> slice:
        """Rows of the slots of ``rank``."""
        slots = batch.placement.slots_of_rank(rank)
        begin = sum(self.plan.counts[: slots[0]])
        return slice(begin, begin + sum(self.plan.counts[slot] for slot in slots))


def whole(batch: Batch) -> Whole:
    dispatcher = LocalDispatcher({LAYER: Placement.identity(batch.placement.num_slots)})
    ranks = range(batch.placement.num_ranks)
    plan = dispatcher.plan(LAYER, torch.cat([batch.slots_TK(rank) for rank in ranks]))
    rows_AD, weights_A = dispatcher.start_dispatch(torch.cat(batch.x_TD), torch.cat(batch.weights_TK), plan).wait()
    assert weights_A is not None
    return Whole(plan, rows_AD, weights_A, dispatcher)


def expert(rows_AD: Tensor, weights_A: Tensor) -> Tensor:
    """Something of each row that is not linear in it, in its dtype."""
    return (rows_AD.tanh() * weights_A[:, None]).to(rows_AD.dtype)


def total(number: Tensor, group: distributed.ProcessGroup) -> float:
    """The sum over the group."""
    number = number.double().clone()
    distributed.all_reduce(number, group=group)
    return number.item()
