"""A rank that is slower than the rest, found in the heartbeats.

Every step ends with all ranks waiting for the slowest, so that wall time is the same on all; what tells them apart is
each rank's *own* time, the step less the time spent waiting.  One slow step is nothing (a checkpoint, another program):
a rank is named when it was slow several times in a row, and again only after it had been as fast as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from abyssal.parallel.watch_beat import Beat, own_seconds_a_step

SLOW = 1.5
"""Times the median of the ranks' own times."""
TIMES_IN_A_ROW = 5
LEAST_SECONDS = 0.005
"""Own time of a step beyond the median below which slowness is noise of the clock."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that holds the others up."""

    rank: int
    step: int
    own_seconds: float
    """Of a step, lately."""
    median_seconds: float
    """Of all ranks."""

    @property
    def times(self) -> float:
        return self.own_seconds / self.median_seconds


class SlowRanks:
    """Compares the ranks' own times whenever each has done a step since the last comparison."""

    def __init__(self) -> None:
        self._before: Sequence[Beat] | None = None
        self._in_a_row: dict[int, int] = {}

    def see(self, beats: Sequence[Beat]) -> list[SlowRank]:
        """Ranks to be named now, by the newest beats of all ranks in order."""
        if self._before is None:
            self._before = beats
            return []
        times = own_seconds_a_step(self._before, beats)
        if times is None:
            return []
        self._before = beats
        middle = median_low(times)
        found = []
        for rank, seconds in enumerate(times):
            slow = seconds > SLOW * middle and seconds - middle > LEAST_SECONDS
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow else 0
            if self._in_a_row[rank] == TIMES_IN_A_ROW:
                found.append(SlowRank(rank, beats[rank].step, seconds, max(middle, 1e-9)))
        return found
