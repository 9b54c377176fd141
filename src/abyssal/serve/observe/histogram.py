"""Counts of values by range, for Prometheus.

The client library's own histogram takes a lock and walks its ranges for every value; this one is a bisection, because
it is asked once for each piece of every stream.  All of a server's values come from its one event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

# The bounds are vLLM's, so that dashboards made for it show what they were made to show.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (*(factor * 10**power for power in range(6) for factor in (1, 2, 5)), 1_000_000)


@dataclass
class Histogram:
    """Values counted."""

    bounds: Sequence[float]
    """Upper ends of the ranges, each included in its own; values beyond the last are counted as well."""
    counts: list[int] = field(init=False)
    sum: float = field(init=False, default=0.0)
    count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, ``times`` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times
        self.count += times

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus' pairs: an upper end, and how many values reach to it at most."""
        ends = [*(f"{float(bound)}" for bound in self.bounds), "+Inf"]
        return list(zip(ends, map(float, accumulate(self.counts)), strict=True))
