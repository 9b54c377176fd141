"""From the placement in force to a balanced one with few weights on the move.

EPLB computes each placement from nothing, so nearly every expert moves whenever it is asked.  Here a problem whose
busiest rank is no busier than that of a fresh placement, but for a tolerance, stays as it is.  Where it is busier, the
placement in force is refined, the best change first, until it is within the tolerance.  Where that does not reach it
the fresh placement is taken, its ranks numbered so that they keep what they can; so it is where refining moved more
than half of the slots, if it moves fewer.

Legend: M problems, E experts, R ranks, Q slots of a rank.
"""

from __future__ import annotations

import numpy as np

from abyssal.parallel.placement_packing import Integers, held, rank_loads
from abyssal.parallel.placement_refining import refine


def adapted(loads_ME: Integers, fresh_MRQ: Integers, current_MRQ: Integers, enough_M: Integers) -> Integers:
    """A placement near to ``current_MRQ`` whose busiest rank is no busier than ``enough_M``, as ``fresh_MRQ``'s is."""
    experts = loads_ME.shape[1]
    result_MRQ = current_MRQ.copy()
    refine(result_MRQ, loads_ME, enough_M)
    moved_M = num_moves(result_MRQ, current_MRQ, experts)
    far = rank_loads(result_MRQ, loads_ME).max(axis=1) > enough_M
    rows = np.nonzero(far | (2 * moved_M > current_MRQ[0].size))[0]
    if len(rows):
        renumbered_MRQ = _renumbered(fresh_MRQ[rows], current_MRQ[rows], experts)
        taken = far[rows] | (num_moves(renumbered_MRQ, current_MRQ[rows], experts) < moved_M[rows])
        result_MRQ[rows[taken]] = renumbered_MRQ[taken]
    return _settled(result_MRQ, current_MRQ)


def num_moves(after_MRQ: Integers, before_MRQ: Integers, num_experts: int) -> Integers:
    """Slots of each problem (M,) whose expert was not on their rank."""
    more = held(after_MRQ, num_experts) - held(before_MRQ, num_experts)
    return np.maximum(more, 0).sum(axis=(1, 2))


def _renumbered(fresh_MRQ: Integers, current_MRQ: Integers, num_experts: int) -> Integers:
    """``fresh_MRQ`` with its ranks in the order in which they keep most; those that can keep most choose first."""
    problems, num_ranks, _ = fresh_MRQ.shape
    fresh_MER = held(fresh_MRQ, num_experts).astype(np.float32).swapaxes(1, 2)
    shared_MRR = np.matmul(held(current_MRQ, num_experts).astype(np.float32), fresh_MER)
    order_MR = np.argsort(-shared_MRR.max(axis=2, initial=0), axis=1, kind="stable")
    rows = np.arange(problems)
    result_MRQ = np.empty_like(fresh_MRQ)
    for place in range(num_ranks):
        rank = order_MR[:, place]
        chosen = shared_MRR[rows, rank].argmax(axis=1)
        result_MRQ[rows, rank] = fresh_MRQ[rows, chosen]
        shared_MRR[rows, :, chosen] = -1
    return result_MRQ


def _settled(slots_MRQ: Integers, current_MRQ: Integers) -> Integers:
    """The same with each expert that stays on its rank in the slot that it had."""
    result_MRQ = slots_MRQ.copy()
    for problem, rank in np.argwhere((slots_MRQ != current_MRQ).any(axis=2)):
        arriving = slots_MRQ[problem, rank].tolist()
        free = []
        for slot, expert in enumerate(current_MRQ[problem, rank].tolist()):
            if expert in arriving:
                arriving.remove(expert)
                result_MRQ[problem, rank, slot] = expert
            else:
                free.append(slot)
        result_MRQ[problem, rank, free] = sorted(arriving)
    return result_MRQ
