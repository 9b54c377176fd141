"""How many slots each expert gets and which rank each slot is on: greedy, then swaps; many problems at once.

A problem is a layer, or one node's share of a layer.  Loads are whole numbers of a common unit, and a slot's weight is
its expert's load over its slots, rounded down, so that every sum is exact and every comparison comes out the same on
any machine.  Ties go to the lower number.

1. *Replicate*: each slot beyond one an expert goes to the expert with the largest weight.  That makes the largest
   weight as small as it can be.
2. *Pack*: slots by descending weight, each onto the least loaded rank with a free slot.  That far it is EPLB's plan
   (github.com/deepseek-ai/EPLB), which may put an expert on a rank twice; one of the two slots is wasted then.
3. Where it did, two ways out are tried: to pack again with ranks that hold the expert already left out, or to give the
   second slot to the lightest expert that the rank lacks.  Where the first runs into a corner, slots are exchanged
   until no rank has an expert twice; that is always possible when a rank has no more slots than there are experts.
4. *Refine* (in ``placement_refining``): what greed left over is evened out between the busiest rank and others.

Legend: M problems, E experts, S slots, R ranks, Q slots of a rank (S = R·Q).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_HELD = np.int64(1) << 61
"""Added to the load of a rank that holds the expert already: above any load, below ``_FULL``."""
_FULL = np.int64(1) << 62


def replicate(loads_ME: Integers, num_slots: int, num_ranks: int) -> Integers:
    """Slots of each expert (M, E), at least one each and ``num_slots`` in all.

    None gets more than there are ranks, unless a rank has more slots than there are experts.
    """
    problems, experts = loads_ME.shape
    most = num_ranks if num_slots <= experts * num_ranks else num_slots
    rows = np.arange(problems)
    counts_ME = np.ones_like(loads_ME)
    weights_ME = loads_ME.copy() if most > 1 else np.full_like(loads_ME, -1)
    for _ in range(num_slots - experts):
        chosen = weights_ME.argmax(axis=1)
        counts_ME[rows, chosen] += 1
        count = counts_ME[rows, chosen]
        weights_ME[rows, chosen] = np.where(count < most, loads_ME[rows, chosen] // count, -1)
    return counts_ME


def pack(loads_ME: Integers, counts_ME: Integers, num_ranks: int, apart: bool) -> Integers:
    """The expert of each slot (M, R, Q).

    Args:
        apart: no expert twice on a rank, where that can be avoided.
    """
    weights_ME = loads_ME // counts_ME
    slots_MRQ = _greedy(weights_ME, counts_ME, num_ranks, apart)
    if apart:
        for problem in np.nonzero(repeats(slots_MRQ))[0]:
            _spread(slots_MRQ[problem], weights_ME.shape[1])
    return slots_MRQ


def repeats(slots_MRQ: Integers) -> NDArray[np.bool_]:
    """Where a rank holds an expert twice (M,)."""
    ordered = np.sort(slots_MRQ, axis=2)
    return (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))


def replace_repeats(slots_MRQ: Integers, loads_ME: Integers) -> None:
    """Give, in place, each second slot of an expert on a rank to the lightest expert that the rank lacks."""
    for problem in np.nonzero(repeats(slots_MRQ))[0]:
        slots_RQ, loads_E = slots_MRQ[problem], loads_ME[problem]
        counts_E = np.bincount(slots_RQ.ravel(), minlength=len(loads_E))
        for slots_Q in slots_RQ:
            for place in range(1, len(slots_Q)):
                if slots_Q[place] in slots_Q[:place]:
                    weights_E = loads_E // (counts_E + 1)
                    weights_E[slots_Q] = _FULL
                    lightest = weights_E.argmin()
                    counts_E[[slots_Q[place], lightest]] += (-1, 1)
                    slots_Q[place] = lightest


def held(slots_MRQ: Integers, num_experts: int) -> Integers:
    """How many slots of each rank hold each expert (M, R, E)."""
    problems, num_ranks, _ = slots_MRQ.shape
    rank = np.arange(problems * num_ranks).reshape(problems, num_ranks, 1)
    flat = np.bincount((rank * num_experts + slots_MRQ).ravel(), minlength=problems * num_ranks * num_experts)
    return flat.reshape(problems, num_ranks, num_experts)


def rank_loads(slots_MRQ: Integers, loads_ME: Integers) -> Integers:
    """The load of each rank (M, R)."""
    problems, experts = loads_ME.shape
    flat_MS = slots_MRQ.reshape(problems, slots_MRQ.shape[1] * slots_MRQ.shape[2])
    place = np.arange(problems)[:, None] * experts + flat_MS
    counts_ME = np.bincount(place.ravel(), minlength=loads_ME.size).reshape(loads_ME.shape)
    weights_MS = np.take_along_axis(loads_ME // counts_ME, flat_MS, axis=1)
    return weights_MS.reshape(slots_MRQ.shape).sum(axis=2)


def _greedy(weights_ME: Integers, counts_ME: Integers, num_ranks: int, apart: bool) -> Integers:
    problems = len(weights_ME)
    by_weight_ME = np.argsort(-weights_ME, axis=1, kind="stable")
    copies = np.take_along_axis(counts_ME, by_weight_ME, axis=1).ravel()
    order_MS = np.repeat(by_weight_ME.ravel(), copies).reshape(problems, -1)
    weights_SM = np.ascontiguousarray(np.take_along_axis(weights_ME, order_MS, axis=1).T)
    order_SM = np.ascontiguousarray(order_MS.T)
    num_slots = len(order_SM)
    copies_end = int(np.nonzero((order_SM[1:] == order_SM[:-1]).any(axis=1))[0].max(initial=-1)) + 1 if apart else 0
    rank_size = num_slots // num_ranks
    cost_MR = np.zeros((problems, num_ranks), np.int64)
    filled = np.zeros(problems * num_ranks, np.int64)
    held_MR = np.zeros_like(cost_MR)
    slots = np.empty(problems * num_slots, np.int64)
    first = np.arange(problems) * num_ranks
    cost = cost_MR.reshape(-1)
    for slot in range(num_slots):
        if 0 < slot <= copies_end:
            held_MR *= (order_SM[slot] == order_SM[slot - 1])[:, None]
        rank = first + (cost_MR + held_MR if slot <= copies_end else cost_MR).argmin(axis=1)
        if slot < copies_end:
            held_MR.reshape(-1)[rank] = _HELD
        place = filled[rank]
        slots[rank * rank_size + place] = order_SM[slot]
        filled[rank] = place + 1
        cost[rank] += np.where(place + 1 == rank_size, _FULL, weights_SM[slot])
    return slots.reshape(problems, num_ranks, rank_size)


def _spread(slots_RQ: Integers, num_experts: int) -> None:
    """Exchange slots, in place, until no rank holds an expert twice.

    Each exchange leaves one repeated slot fewer: a repeated expert goes to a rank without it, for an expert that the
    first rank lacks, or one that is repeated there.
    """
    held_RE = np.stack([np.bincount(slots_Q, minlength=num_experts) for slots_Q in slots_RQ])
    while (held_RE > 1).any():
        rank, expert = (int(index) for index in np.argwhere(held_RE > 1)[0])
        place = int(np.nonzero(slots_RQ[rank] == expert)[0][0])
        for other in np.nonzero(held_RE[:, expert] == 0)[0]:
            welcome = (held_RE[rank, slots_RQ[other]] == 0) | (held_RE[other, slots_RQ[other]] > 1)
            if welcome.any():
                break
        else:
            return
        there = int(welcome.argmax())
        given = slots_RQ[other, there]
        slots_RQ[rank, place], slots_RQ[other, there] = given, expert
        held_RE[[rank, other], expert] += (-1, 1)
        held_RE[[rank, other], given] += (1, -1)
