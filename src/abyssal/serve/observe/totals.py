"""The engine's counts over all of its processes: a restart begins them anew, and a counter must never fall."""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from abyssal.engine.wire import Statistics

COUNTS = (
    "preemptions",
    "steps",
    "step_seconds",
    "prompt_tokens",
    "memory_hit_tokens",
    "disk_hit_tokens",
    "output_tokens",
)
COUNTS_BY_POSITION = ("drafted", "accepted")


class EngineTotals:
    """Statistics whose counts go on where a process that died left them.

    A new process is known by any count that is lower than before.  One that had counted more than its predecessor
    before it was first looked at would be taken for it; loading takes longer than the second between two looks.
    """

    def __init__(self) -> None:
        self._before = Statistics()
        self._newest = Statistics()
        self.current = Statistics()
        """The newest state with counts since the server's start."""

    def update(self, newest: Statistics) -> Statistics:
        """Look at what the engine says now; returns :attr:`current`."""
        if newest is self._newest:
            return self.current
        if _is_another_process(self._newest, newest):
            self._before = _sum(self._before, self._newest)
        self._newest = newest
        self.current = _sum(self._before, newest)
        return self.current


def _is_another_process(old: Statistics, new: Statistics) -> bool:
    if any(getattr(new, name) < getattr(old, name) for name in COUNTS):
        return True
    pairs = [pair for name in COUNTS_BY_POSITION for pair in _pairs(getattr(old, name), getattr(new, name))]
    return any(after < before for before, after in pairs)


def _sum(before: Statistics, newest: Statistics) -> Statistics:
    """``newest`` with the counts of both."""
    counts = {name: getattr(before, name) + getattr(newest, name) for name in COUNTS}
    by_position = {
        name: tuple(a + b for a, b in _pairs(getattr(before, name), getattr(newest, name)))
        for name in COUNTS_BY_POSITION
    }
    return msgspec.structs.replace(newest, **counts, **by_position)


def _pairs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, int]]:
    """By position; a list that ends counts on as zeros."""
    return list(zip_longest(before, after, fillvalue=0))
