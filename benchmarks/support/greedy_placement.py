"""The plan of EPLB (github.com/deepseek-ai/EPLB) as plainly as it can be written: what placements are held to.

Slots go to the expert with the largest load a slot; then slots by descending weight go to the least loaded rank that
has room, whatever stands there already; with groups that divide over the nodes, groups go to nodes so first.  Each
layer, each slot and each rank is a step of Python, in fractions: no rounding, and nothing shared with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def greedy_slots(
    loads: Sequence[float], num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> list[int]:
    """The expert of each slot, ranks one after another."""
    exact = [Fraction(load) for load in loads]
    if num_groups % num_nodes:
        num_nodes, num_groups = 1, 1
    size = len(exact) // num_groups
    groups = [sum(exact[group * size : (group + 1) * size], Fraction(0)) for group in range(num_groups)]
    slots: list[int] = []
    for packed in _packed(groups, num_nodes):
        experts = [group * size + member for group in packed for member in range(size)]
        copies = replicated([exact[expert] for expert in experts], num_slots // num_nodes)
        weights = [exact[experts[local]] / copies.count(local) for local in copies]
        for rank in _packed(weights, num_ranks // num_nodes):
            slots += [experts[copies[slot]] for slot in rank]
    return slots


def replicated(loads: Sequence[Fraction], num_slots: int) -> list[int]:
    """The expert of each slot: all once, then whichever has the largest load a slot."""
    counts = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda expert: loads[expert] / counts[expert])
        counts[busiest] += 1
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


def _packed(weights: Sequence[Fraction], num_packs: int) -> list[list[int]]:
    """Items of each pack, equally many: by descending weight, each into the lightest pack with room."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [Fraction(0)] * num_packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        room = [pack for pack in range(num_packs) if len(packs[pack]) < len(weights) // num_packs]
        lightest = min(room, key=lambda pack: total[pack])
        packs[lightest].append(item)
        total[lightest] += weights[item]
    return packs
