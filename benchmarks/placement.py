"""Placements of V3's 58 layers of 256 experts beside EPLB's greedy plan: time, balance, wasted slots, and moves.

    python benchmarks/placement.py [--layers 58] [--seed 0] [--repeats 5] [--results FOLDER]

Loads of each layer are drawn: zipf (the n-th busiest expert has 1/n, in a random order), lognormal (sigma 1), uniform
(80 to 120).  Balance is the mean load of a rank over the busiest rank's, mean of the layers and the worst layer's.
Wasted are slots on a rank that has another of the same expert.  Then loads drift (each times a lognormal factor, sigma
0.2) and placements are found again: from nothing, and from what is in force.  Moves are slots whose expert was not on
their rank.  Every number but the times follows from the seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support.greedy_placement import greedy_slots
from support.record import RESULTS, announce, header, save, seconds

from abyssal.parallel.placement import balanced_placement, balancedness, moves
from abyssal.spec.placement import Placement

EXPERTS, GROUPS = 256, 8
KINDS = ("zipf", "lognormal", "uniform")


@dataclass(frozen=True)
class Cluster:
    """What one copy of the experts is spread over."""

    slots: int
    ranks: int
    nodes: int

    def __str__(self) -> str:
        return f"{self.slots} on {self.ranks}, {self.nodes} node{'s' if self.nodes > 1 else ''}"

    def greedy(self, loads_LE: NDArray[np.float64]) -> list[Placement]:
        found = (greedy_slots(loads_E, self.slots, self.ranks, self.nodes, GROUPS) for loads_E in loads_LE.tolist())
        return [Placement(EXPERTS, tuple(slots), self.ranks) for slots in found]

    def placed(self, loads_LE: NDArray[np.float64], current: Sequence[Placement] | None = None) -> list[Placement]:
        return balanced_placement(loads_LE, self.slots, self.ranks, self.nodes, GROUPS, current)


CLUSTERS = (Cluster(288, 32, 1), Cluster(288, 32, 4), Cluster(288, 32, 8), Cluster(320, 64, 8), Cluster(320, 320, 40))


@dataclass(frozen=True)
class Row:
    """One way to place one kind of load on one cluster."""

    cluster: str
    loads: str
    way: str
    milliseconds: float | None
    """None for the greedy plan, which is written to be read."""
    balance: float
    worst: float
    wasted: float
    """Slots a layer."""
    moves: float | None
    """Slots a layer, from the placement before the loads drifted."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; the median counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of placement.json")
    chosen = parser.parse_args()
    if min(chosen.layers, chosen.repeats) < 1:
        parser.error("--layers and --repeats are 1 or more")
    about = header()
    announce(about)
    rows = [
        row
        for cluster in CLUSTERS
        for kind in KINDS
        for row in measured(cluster, kind, chosen.layers, chosen.seed, chosen.repeats)
    ]
    print(*described(rows), sep="\n")
    data = {**about, "layers": chosen.layers, "seed": chosen.seed, "rows": [asdict(row) for row in rows]}
    print(f"saved {save('placement', data, chosen.results)}")
    return 0


def drawn(kind: str, layers: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Loads, and what they drift to; in whole tokens."""
    draw = np.random.default_rng(seed)
    if kind == "zipf":
        loads_LE = np.stack([draw.permutation(1 / np.arange(1, EXPERTS + 1)) for _ in range(layers)])
    elif kind == "lognormal":
        loads_LE = draw.lognormal(size=(layers, EXPERTS))
    else:
        loads_LE = draw.uniform(0.8, 1.2, (layers, EXPERTS))
    drifted_LE = loads_LE * draw.lognormal(sigma=0.2, size=loads_LE.shape)
    return np.rint(loads_LE * 1e6), np.rint(drifted_LE * 1e6)


def measured(cluster: Cluster, kind: str, layers: int, seed: int, repeats: int) -> list[Row]:
    loads_LE, drifted_LE = drawn(kind, layers, seed)

    def row(
        way: str,
        placements: list[Placement],
        loads: NDArray[np.float64],
        before: list[Placement] | None,
        time: float | None,
    ) -> Row:
        balance = [balancedness(placement, loads_E) for placement, loads_E in zip(placements, loads, strict=True)]
        wasted = statistics.mean(map(_repeated, placements))
        moved = None if before is None else statistics.mean(map(moves, before, placements))
        return Row(str(cluster), kind, way, time, statistics.mean(balance), min(balance), wasted, moved)

    before = cluster.placed(loads_LE)
    return [
        row("greedy", cluster.greedy(loads_LE), loads_LE, None, None),
        row("abyssal", before, loads_LE, None, _milliseconds(lambda: cluster.placed(loads_LE), repeats)),
        row("left as it was", before, drifted_LE, before, None),
        row("greedy anew", cluster.greedy(drifted_LE), drifted_LE, cluster.greedy(loads_LE), None),
        row(
            "abyssal, from what is in force",
            cluster.placed(drifted_LE, before),
            drifted_LE,
            before,
            _milliseconds(lambda: cluster.placed(drifted_LE, before), repeats),
        ),
    ]


def _repeated(placement: Placement) -> int:
    ranks = [placement.experts_of_rank(rank) for rank in range(placement.num_ranks)]
    return sum(len(experts) - len(set(experts)) for experts in ranks)


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    return 1000 * statistics.median(seconds(function) for _ in range(repeats))


def described(rows: list[Row]) -> list[str]:
    lines = []
    for index, row in enumerate(rows):
        if index == 0 or (rows[index - 1].cluster, rows[index - 1].loads) != (row.cluster, row.loads):
            title = f"{row.cluster}, {row.loads}"
            lines.append(f"{title:<32} {'ms':>7} {'balance':>8} {'worst':>7} {'wasted':>7} {'moves':>7}")
        time = "" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        moved = "" if row.moves is None else f"{row.moves:.1f}"
        lines.append(f"  {row.way:<30} {time:>7} {row.balance:>8.3f} {row.worst:>7.3f} {row.wasted:>7.1f} {moved:>7}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
