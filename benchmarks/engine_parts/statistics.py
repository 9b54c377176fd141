"""Summaries of what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

SHARES = (50, 90, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` per cent of all do not exceed (nearest rank: a value that occurred).

    Raises:
        ValueError: there are no values, or the share lies outside 0..100.
    """
    if not values:
        raise ValueError("no values have no percentile")
    if not 0 <= share <= 100:
        raise ValueError(f"share: {share} must lie in 0..100")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th, by name; empty of no values."""
    return {f"p{share}": percentile(values, share) for share in SHARES} if values else {}


def steady(times: Sequence[float], skip: int) -> float:
    """The median seconds between one of ``times`` and the next, without the first ``skip``."""
    intervals = [after - before for before, after in pairwise(times)]
    return statistics.median(intervals[skip:])


def round_ratios(ours: Sequence[float], theirs: Mapping[str, Sequence[float]]) -> tuple[str, float, list[float]]:
    """Our rate over the best peer's: whose that is, of medians, and the ratio of each round.

    Contestants take turns within a round, so what else the machine did then weighs on both sides of its ratio.
    """
    best = max(theirs, key=lambda name: statistics.median(theirs[name]))
    each = [own / other for own, other in zip(ours, theirs[best], strict=True)]
    return best, statistics.median(ours) / statistics.median(theirs[best]), each
