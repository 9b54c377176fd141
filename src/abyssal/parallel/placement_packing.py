"""How many slots each expert gets and which rank each slot is on: greedy, then swaps; many problems at once.

A problem is a layer, or one node's share of a layer.  Loads are whole numbers of a common unit, and a slot's weight is
its expert's load over its slots, rounded down, so that every sum is exact and every comparison comes out the same on
any machine.  Ties go to the lower number.

1. *Replicate*: each slot beyond one an expert goes to the expert with the largest weight.  That makes the largest
   weight as small as it can be.
2. *Pack*: slots by descending weight, each onto the least loaded rank with a free slot that does not hold the expert
   yet.  EPLB (github.com/deepseek-ai/EPLB) lets two slots of an expert share a rank; one of them is wasted there.
3. *Spread*: where packing ran into a corner and an expert is twice on a rank, slots are exchanged until it is not.
   That is always possible when a rank has no more slots than there are experts.
4. *Refine*: slots are exchanged between the busiest rank and another as long as that makes the busier of the two less
   busy than the busiest was.

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


def pack(loads_ME: Integers, counts_ME: Integers, num_ranks: int) -> Integers:
    """The expert of each slot (M, R, Q), balanced as far as it goes."""
    weights_ME = loads_ME // counts_ME
    slots_MRQ = _greedy(weights_ME, counts_ME, num_ranks)
    spread(slots_MRQ, weights_ME.shape[1])
    refine(slots_MRQ, weights_ME)
    return slots_MRQ


def rank_loads(slots_MRQ: Integers, weights_ME: Integers) -> Integers:
    """The load of each rank (M, R)."""
    problems = len(slots_MRQ)
    return np.take_along_axis(weights_ME, slots_MRQ.reshape(problems, -1), axis=1).reshape(slots_MRQ.shape).sum(axis=2)


def _greedy(weights_ME: Integers, counts_ME: Integers, num_ranks: int) -> Integers:
    problems = len(weights_ME)
    by_weight_ME = np.argsort(-weights_ME, axis=1, kind="stable")
    copies = np.take_along_axis(counts_ME, by_weight_ME, axis=1).ravel()
    order_MS = np.repeat(by_weight_ME.ravel(), copies).reshape(problems, -1)
    weights_SM = np.ascontiguousarray(np.take_along_axis(weights_ME, order_MS, axis=1).T)
    order_SM = np.ascontiguousarray(order_MS.T)
    num_slots = len(order_SM)
    last_copy = int(np.nonzero((order_SM[1:] == order_SM[:-1]).any(axis=1))[0].max(initial=-1)) + 1
    rank_size = num_slots // num_ranks
    cost_MR = np.zeros((problems, num_ranks), np.int64)
    filled = np.zeros(problems * num_ranks, np.int64)
    held_MR = np.zeros_like(cost_MR)
    slots = np.empty(problems * num_slots, np.int64)
    first = np.arange(problems) * num_ranks
    cost = cost_MR.reshape(-1)
    for slot in range(num_slots):
        if 0 < slot <= last_copy:
            held_MR *= (order_SM[slot] == order_SM[slot - 1])[:, None]
        rank = first + (cost_MR + held_MR if slot <= last_copy else cost_MR).argmin(axis=1)
        if slot < last_copy:
            held_MR.reshape(-1)[rank] = _HELD
        place = filled[rank]
        slots[rank * rank_size + place] = order_SM[slot]
        filled[rank] = place + 1
        cost[rank] += np.where(place + 1 == rank_size, _FULL, weights_SM[slot])
    return slots.reshape(problems, num_ranks, rank_size)


def spread(slots_MRQ: Integers, num_experts: int) -> None:
    """Exchange slots, in place, until no rank holds an expert twice, where that is possible."""
    _, num_ranks, rank_size = slots_MRQ.shape
    if rank_size == 1 or num_ranks == 1 or rank_size > num_experts:
        return
    ordered = np.sort(slots_MRQ, axis=2)
    for problem in np.nonzero((ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2)))[0]:
        _spread_one(slots_MRQ[problem], num_experts)


def _spread_one(slots_RQ: Integers, num_experts: int) -> None:
    """Each exchange leaves one repeated slot fewer: a repeated expert goes to a rank without it, for an expert that the
    first rank lacks, or one that is repeated there."""
    held_RE = np.stack([np.bincount(ranks, minlength=num_experts) for ranks in slots_RQ])
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


def refine(slots_MRQ: Integers, weights_ME: Integers, enough_M: Integers | None = None) -> None:
    """Exchange slots with the busiest rank, in place, while that helps.

    Args:
        enough_M: a load that the busiest rank of each problem may have; it is left alone then.
    """
    _, num_ranks, rank_size = slots_MRQ.shape
    if rank_size == 1 or num_ranks == 1:
        return
    active = np.arange(len(slots_MRQ))
    while len(active):
        if enough_M is not None:
            busiest = rank_loads(slots_MRQ[active], weights_ME[active]).max(axis=1)
            active = active[busiest > enough_M[active]]
        slots, helped = _exchanged(slots_MRQ[active], weights_ME[active])
        slots_MRQ[active] = slots
        active = active[helped]


def _exchanged(slots_MRQ: Integers, weights_ME: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """The best exchange with each problem's busiest rank, made; and where there was one."""
    problems, num_ranks, rank_size = slots_MRQ.shape
    rows = np.arange(problems)
    flat_MS = slots_MRQ.reshape(problems, -1)
    weights_MS = np.take_along_axis(weights_ME, flat_MS, axis=1)
    loads_MR = weights_MS.reshape(slots_MRQ.shape).sum(axis=2)
    busiest = loads_MR.argmax(axis=1)
    load = loads_MR[rows, busiest]
    own_MQ = slots_MRQ[rows, busiest]
    less_MQS = np.take_along_axis(weights_ME, own_MQ, axis=1)[:, :, None] - weights_MS[:, None, :]
    other_MS = np.repeat(loads_MR, rank_size, axis=1)
    after_MQS = np.maximum(load[:, None, None] - less_MQS, other_MS[:, None, :] + less_MQS)
    held_MRE = np.zeros((problems, num_ranks, weights_ME.shape[1]), bool)
    held_MRE[rows[:, None], np.arange(num_ranks * rank_size) // rank_size, flat_MS] = True
    twice_MQR = held_MRE[rows[:, None], :, own_MQ]
    twice_MS = held_MRE[rows[:, None], busiest[:, None], flat_MS]
    refused_MQS = np.repeat(twice_MQR, rank_size, axis=2) | twice_MS[:, None, :]
    after_MQS[refused_MQS] = _FULL
    best = after_MQS.reshape(problems, -1).argmin(axis=1)
    helped = after_MQS.reshape(problems, -1)[rows, best] < load
    place, slot = np.divmod(best[helped], num_ranks * rank_size)
    mine = busiest[helped] * rank_size + place
    changed_MS = flat_MS.copy()
    changed_MS[helped, mine], changed_MS[helped, slot] = flat_MS[helped, slot], flat_MS[helped, mine]
    return changed_MS.reshape(slots_MRQ.shape), helped
