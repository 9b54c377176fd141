"""Few combinations of options in which every pair of values that may stand together does so at least once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def all_rows(options: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """The full product."""
    rows = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    return [row for row in rows if allowed(row)]


def pairwise_rows(options: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Greedily, the row with the most pairs that are still missing, the first of equals."""
    rows = all_rows(options, allowed)
    missing, chosen = set().union(*map(_pairs, rows)), []
    while missing:
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(row: Row) -> set[tuple[Any, ...]]:
    return {(one, row[one], other, row[other]) for one, other in combinations(row, 2)}
