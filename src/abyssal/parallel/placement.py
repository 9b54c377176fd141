"""Which expert goes where, from the loads that were observed: V3's redundant experts [V3 section 3.4], without torch.

A :class:`~abyssal.spec.placement.Placement` says what each slot holds; here one is chosen for each layer, by one of two
policies:

- *hierarchical*: groups of experts are packed onto nodes, and the experts of a node onto its ranks, each node with
  equally many slots.  All slots of a group are on one node, so a token that is limited to M groups crosses to at most M
  nodes [V3 section 2.1.2].  It needs groups that divide evenly over the nodes.
- *global*: slots are packed onto ranks without regard to groups or nodes.  It balances better and sends more.

``auto`` is hierarchical where the groups divide evenly over the nodes and the slots over them, and global otherwise;
it depends on the numbers alone, never on the loads.

The plan is EPLB's (github.com/deepseek-ai/EPLB), with what its users ask of it: no expert twice on a rank where that
can be avoided, swaps after the greedy packing, the placement in force taken into account so that few weights travel,
and integers throughout, so that every rank computes the same.  What each step does is in ``placement_packing``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from abyssal.parallel.placement_groups import hierarchical, placed
from abyssal.parallel.placement_packing import Integers
from abyssal.spec.placement import Placement

Policy = Literal["auto", "hierarchical", "global"]

_LARGEST = 44
"""Bits of the largest load: with up to 65,536 experts sums stay below 2 to the power of 60."""


def initial_placement(
    num_experts: int, redundant: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> Placement:
    """The placement before any load is known: every expert once and in order, or as equal loads would have it.

    Raises:
        ValueError: as :func:`balanced_placement`.
    """
    if redundant == 0 and num_experts % num_ranks == 0:
        return Placement.identity(num_experts, num_ranks)
    loads = np.ones(num_experts, np.int64)
    return balanced_placement(loads, num_experts + redundant, num_ranks, num_nodes, num_groups)[0]


def balanced_placement(
    loads: ArrayLike,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    current: Sequence[Placement] | None = None,
    *,
    policy: Policy = "auto",
    tolerance: float = 0.05,
) -> list[Placement]:
    """A placement for each layer that evens out the ranks' loads.

    Args:
        loads: tokens (or any measure) of each expert, (E,) or (L, E).
        num_slots: of a layer, at least one an expert.
        num_ranks: among which a copy of the experts is spread; equally many slots on each.
        num_nodes: that those ranks are on, in order, equally many on each.
        num_groups: of experts, as the router's node limit has them.
        current: the placements in force, a layer each; what is balanced enough then stays where it is.
        policy: see the module's head.
        tolerance: a layer's busiest rank may be busier than it need be by this share before experts move.

    Raises:
        ValueError: loads that are none, numbers that do not divide, or a policy that they do not allow.
    """
    units_LE = _units(loads)
    layers, experts = units_LE.shape
    nodes = _blocks(experts, num_slots, num_ranks, num_nodes, num_groups, policy)
    before_LRQ = _in_force(current, layers, experts, num_slots, num_ranks)
    if nodes == 1:
        slots_LRQ = placed(units_LE, num_slots, num_ranks, before_LRQ, tolerance)
    else:
        slots_LRQ = hierarchical(units_LE, num_slots, num_ranks, nodes, num_groups, before_LRQ, tolerance)
    return [Placement(experts, tuple(slots), num_ranks) for slots in slots_LRQ.reshape(layers, -1).tolist()]


def balancedness(placement: Placement, loads: ArrayLike) -> float:
    """Mean load of a rank over the busiest rank's, 1 where all are equally busy; an expert's load is split evenly."""
    loads_E = np.asarray(loads, np.float64)
    if loads_E.shape != (placement.num_experts,):
        raise ValueError(f"loads have shape {loads_E.shape}; give one of each of {placement.num_experts} experts")
    slots = np.asarray(placement.slots)
    weights_E = loads_E / np.bincount(slots, minlength=placement.num_experts)
    ranks = weights_E[slots].reshape(placement.num_ranks, -1).sum(axis=1)
    return float(ranks.mean() / ranks.max()) if ranks.max() > 0 else 1.0


def moves(before: Placement, after: Placement) -> int:
    """Slots of ``after`` whose expert was not on their rank ``before``: weights that have to travel."""
    return sum(
        (Counter(after.experts_of_rank(rank)) - Counter(before.experts_of_rank(rank))).total()
        for rank in range(after.num_ranks)
    )


def _in_force(
    current: Sequence[Placement] | None, layers: int, experts: int, num_slots: int, num_ranks: int
) -> Integers | None:
    """The slots in force (L, R, Q)."""
    if current is None:
        return None
    if len(current) != layers:
        raise ValueError(f"current has {len(current)} placements for {layers} layers; give one a layer")
    for placement in current:
        found = (placement.num_experts, placement.num_slots, placement.num_ranks)
        if found != (experts, num_slots, num_ranks):
            raise ValueError(
                "current has a placement of {} experts, {} slots and {} ranks; ".format(*found)
                + f"give those of {experts}, {num_slots} and {num_ranks}, or none"
            )
    return np.array([placement.slots for placement in current], np.int64).reshape(layers, num_ranks, -1)


def _units(loads: ArrayLike) -> Integers:
    """Loads (L, E) in whole units: scaled by a power of two, which is exact, and rounded down."""
    given: NDArray[np.float64] = np.atleast_2d(np.asarray(loads, np.float64))
    if given.ndim != 2 or not given.size:
        raise ValueError(f"loads have shape {np.shape(loads)}; give one of each expert, or a row of them a layer")
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("loads have an entry that is negative or not finite; give numbers from 0")
    largest = given.max(axis=1, keepdims=True)
    given = np.where(largest > 0, given, 1.0)
    exponents = np.frexp(given.max(axis=1, keepdims=True))[1]
    return np.floor(np.ldexp(given, _LARGEST - exponents)).astype(np.int64)


def _blocks(experts: int, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int, policy: Policy) -> int:
    """Nodes among which groups are spread; 1 for the global policy."""
    for name, number, whole, of in (
        ("num_nodes", num_nodes, num_ranks, "ranks"),
        ("num_groups", num_groups, experts, "experts"),
        ("num_ranks", num_ranks, num_slots, "slots"),
    ):
        if number < 1 or whole % number:
            raise ValueError(f"{name} is {number}, which does not divide the {whole} {of}; give a divisor")
    if num_slots < experts:
        raise ValueError(f"num_slots is {num_slots} for {experts} experts; give each at least one")
    if policy not in ("auto", "hierarchical", "global"):
        raise ValueError(f"policy is {policy!r}; give auto, hierarchical or global")
    divides = num_groups % num_nodes == 0
    if policy == "hierarchical" and not divides:
        raise ValueError(
            f"the hierarchical policy needs groups that divide over the nodes: {num_groups} groups, {num_nodes} nodes; "
            "give policy global, or auto"
        )
    return num_nodes if divides and policy != "global" else 1
