"""A layer's slots without regard to groups, or with each group of experts on one node.

The hierarchical policy solves the same problem twice: groups onto nodes, as experts of one slot each, then each node's
experts onto its ranks, all layers' nodes at once.

A layer in force that has a group on several nodes (it was placed by the global policy) has nothing that could be kept,
and is placed afresh.

Legend: L layers, N nodes, M problems (layers, or layers × nodes), G groups, E experts, S slots, R ranks, Q slots of a
rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abyssal.parallel.placement_moves import adapted
from abyssal.parallel.placement_packing import Integers, pack, rank_loads, repeats, replace_repeats, replicate
from abyssal.parallel.placement_refining import refine

_EVEN = 256
"""A busiest rank within one part in so many of the mean is not worth another change."""


def placed(
    units_ME: Integers,
    num_slots: int,
    num_ranks: int,
    before_MRQ: Integers | None,
    tolerance: float,
    problems_per_layer: int = 1,
) -> Integers:
    """The slots (M, R, Q) of problems without groups.

    A layer is as slow as its busiest rank, so a problem need be no more even than the unevenest of its layer can be.
    """
    counts_ME = replicate(units_ME, num_slots, num_ranks)
    mean_M = units_ME.sum(axis=1) // num_ranks
    least_M = np.maximum(mean_M + mean_M // _EVEN, (units_ME // counts_ME).max(axis=1))
    fresh_MRQ = _fresh(units_ME, counts_ME, num_ranks, _busiest_of_layer(least_M, problems_per_layer))
    if before_MRQ is None:
        return np.sort(fresh_MRQ, axis=2)
    fresh_M = _busiest_of_layer(rank_loads(fresh_MRQ, units_ME).max(axis=1), problems_per_layer)
    enough_M = fresh_M + np.floor(fresh_M * tolerance).astype(np.int64)
    if before_MRQ.shape[2] <= units_ME.shape[1]:
        before_MRQ = before_MRQ.copy()
        replace_repeats(before_MRQ, units_ME)
    return adapted(units_ME, fresh_MRQ, before_MRQ, enough_M)


def _fresh(units_ME: Integers, counts_ME: Integers, num_ranks: int, enough_M: Integers) -> Integers:
    """Packed and refined; of the two ways to keep an expert's slots apart the better, problem by problem."""
    slots_MRQ = pack(units_ME, counts_ME, num_ranks, apart=False)
    again = np.nonzero(repeats(slots_MRQ))[0]
    if not len(again) or slots_MRQ.shape[2] > units_ME.shape[1]:
        refine(slots_MRQ, units_ME, enough_M)
        return slots_MRQ
    replaced_MRQ = slots_MRQ[again]
    replace_repeats(replaced_MRQ, units_ME[again])
    refine(replaced_MRQ, units_ME[again], enough_M[again])
    slots_MRQ[again] = pack(units_ME[again], counts_ME[again], num_ranks, apart=True)
    refine(slots_MRQ, units_ME, enough_M)
    apart_M = rank_loads(slots_MRQ[again], units_ME[again]).max(axis=1)
    better = rank_loads(replaced_MRQ, units_ME[again]).max(axis=1) < apart_M
    slots_MRQ[again[better]] = replaced_MRQ[better]
    return slots_MRQ


def _busiest_of_layer(load_M: Integers, problems_per_layer: int) -> Integers:
    return np.repeat(load_M.reshape(-1, problems_per_layer).max(axis=1), problems_per_layer)


def hierarchical(
    units_LE: Integers,
    num_slots: int,
    num_ranks: int,
    num_nodes: int,
    num_groups: int,
    before_LRQ: Integers | None,
    tolerance: float,
) -> Integers:
    """Groups onto nodes, as experts of one slot each; then each node's experts onto its ranks.

    A group that comes to a node takes over the slots of one that leaves, the busier experts those of the busier.
    """
    layers, experts = units_LE.shape
    group_size = experts // num_groups
    groups_LG = units_LE.reshape(layers, num_groups, group_size).sum(axis=2)
    groups_before = None
    if before_LRQ is not None:
        apart = ~_together(before_LRQ, num_nodes, num_groups, group_size)
        if apart.any():
            before_LRQ = before_LRQ.copy()
            before_LRQ[apart] = hierarchical(units_LE[apart], num_slots, num_ranks, num_nodes, num_groups, None, 0.0)
        on_node_LNG = _groups_on_nodes(before_LRQ, num_nodes, num_groups, group_size)
        groups_before = on_node_LNG.nonzero()[2].reshape(layers, num_nodes, -1)
    groups_LNG = placed(groups_LG, num_groups, num_nodes, groups_before, tolerance)
    members_ME = (groups_LNG[..., None] * group_size + np.arange(group_size)).reshape(layers * num_nodes, -1)
    units_ME = np.take_along_axis(np.repeat(units_LE, num_nodes, axis=0), members_ME, axis=1)
    before_MRQ = None
    if before_LRQ is not None and groups_before is not None:
        before_ME = (groups_before[..., None] * group_size + np.arange(group_size)).reshape(members_ME.shape)
        before_MS = before_LRQ.reshape(layers * num_nodes, -1)
        taken_MS = _taken_over(before_MS, before_ME, members_ME, np.repeat(units_LE, num_nodes, axis=0))
        before_MRQ = taken_MS.reshape(layers * num_nodes, num_ranks // num_nodes, -1)
    slots_MRQ = placed(units_ME, num_slots // num_nodes, num_ranks // num_nodes, before_MRQ, tolerance, num_nodes)
    named = np.take_along_axis(members_ME, slots_MRQ.reshape(layers * num_nodes, -1), axis=1)
    return named.reshape(layers, num_ranks, -1)


def _together(slots_LRQ: Integers, num_nodes: int, num_groups: int, group_size: int) -> NDArray[np.bool_]:
    """Whether each layer has every group on one node, and equally many on each."""
    on_node_LNG = _groups_on_nodes(slots_LRQ, num_nodes, num_groups, group_size)
    return (on_node_LNG.sum(axis=1) == 1).all(axis=1) & (on_node_LNG.sum(axis=2) * num_nodes == num_groups).all(axis=1)


def _groups_on_nodes(slots_LRQ: Integers, num_nodes: int, num_groups: int, group_size: int) -> NDArray[np.bool_]:
    """Whether each node has a slot of each group (L, N, G)."""
    layers = len(slots_LRQ)
    on_node_LNG = np.zeros((layers, num_nodes, num_groups), bool)
    groups_LNS = (slots_LRQ // group_size).reshape(layers, num_nodes, -1)
    np.put_along_axis(on_node_LNG, groups_LNS, True, axis=2)
    return on_node_LNG


def _taken_over(slots_MS: Integers, before_ME: Integers, after_ME: Integers, units_ME: Integers) -> Integers:
    """``slots_MS`` as places in ``after_ME``, experts that leave a node replaced by those that come to it.

    Args:
        before_ME, after_ME: the experts of each problem's node, equally many.
        units_ME: loads of all experts, for each problem.
    """
    experts = units_ME.shape[1]
    problems = np.arange(len(slots_MS))[:, None]

    def by_load(own_ME: Integers, other_ME: Integers) -> Integers:
        """Those that both have in order, then the others by descending load."""
        shared = np.zeros((len(own_ME), experts), bool)
        shared[problems, other_ME] = True
        stays = shared[problems, own_ME]
        return np.lexsort((own_ME, np.where(stays, 0, -units_ME[problems, own_ME]), ~stays))

    place_ME = np.zeros_like(units_ME)
    place_ME[problems, before_ME[problems, by_load(before_ME, after_ME)]] = by_load(after_ME, before_ME)
    return place_ME[problems, slots_MS]
