"""Heartbeats of ranks, and the judgement over them: who is silent, and who keeps the others waiting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

LOST_BEATS = 4
"""Beats of silence that are enough once another rank has lost its connection to somebody."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, about once a second."""

    number: int
    """One more each time: a rank whose number stays is silent."""
    step: int = 0
    phase: str = "starting"
    steps: int = 0
    """Steps that this process has done."""
    own_seconds: float = 0.0
    """Spent in these steps, less the time spent waiting for other ranks."""
    still: float = 0.0
    """Seconds for which the main thread has stood at one place."""
    waits: bool = False
    """Whether that place is one at which ranks wait for one another."""
    patient: bool = False
    """Whether standing still is to be expected."""
    stack: str = ""
    """Of the main thread, once it has stood still for long."""
    lost: bool = False
    """Whether a collective failed here and the reason is still unknown."""
    left: bool = False
    """Whether the rank has ended as it should."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """A rank that must end the run."""

    kind: Literal["silent", "stands", "deadlock"]
    rank: int
    seconds: float


class Judge:
    """Judges the beats of some ranks, by the judge's own clock alone: clocks of machines differ.

    Time in which the judge itself did not run does not count against the ranks.

    Args:
        interval: seconds between beats.
        timeout: seconds of silence, or of standing still while others wait, after which a rank must end the run.
        standing: whether to judge ranks that stand still; it takes the beats of all.
    """

    def __init__(self, interval: float, timeout: float, standing: bool = True) -> None:
        self._interval = interval
        self._limit = max(timeout - 3 * interval, 2 * interval)  # the others have to hear of it in time
        self._standing = standing
        self._silence: dict[int, float] = {}
        self._numbers: dict[int, int] = {}
        self._seen: float | None = None

    def see(self, now: float, beats: dict[int, Beat]) -> Verdict | None:
        """Judge the newest beats by rank at the time ``now``."""
        passed = 0.0 if self._seen is None else min(now - self._seen, 2 * self._interval)
        self._seen = now
        here = {rank: beat for rank, beat in beats.items() if not beat.left}
        for rank, beat in here.items():
            spoke = self._numbers.get(rank) != beat.number
            self._silence[rank] = 0.0 if spoke else self._silence[rank] + passed
            self._numbers[rank] = beat.number
        return self._silent(here) or (self._stands(here) if self._standing else None)

    def _silent(self, here: dict[int, Beat]) -> Verdict | None:
        lost = any(beat.lost for beat in here.values())
        limit = min(self._limit, LOST_BEATS * self._interval) if lost else self._limit
        rank = max(here, key=lambda rank: self._silence[rank], default=None)
        if rank is None or self._silence[rank] <= limit:
            return None
        return Verdict("silent", rank, self._silence[rank])

    def _stands(self, here: dict[int, Beat]) -> Verdict | None:
        stand = {rank: beat for rank, beat in here.items() if beat.still > self._limit and not beat.patient}
        culprits = [rank for rank, beat in stand.items() if not beat.waits]
        if culprits and any(beat.waits for beat in here.values()):
            rank = max(culprits, key=lambda rank: stand[rank].still)
            return Verdict("stands", rank, stand[rank].still)
        if len(here) > 1 and len(stand) == len(here) and not culprits:
            rank = min(stand, key=lambda rank: (stand[rank].step, rank))
            return Verdict("deadlock", rank, min(beat.still for beat in stand.values()))
        return None


def own_seconds_a_step(before: Sequence[Beat], now: Sequence[Beat]) -> list[float] | None:
    """Of each rank between two sets of beats; None where one has done no step since."""
    pairs = list(zip(before, now, strict=True))
    if any(new.steps <= old.steps for old, new in pairs):
        return None
    return [(new.own_seconds - old.own_seconds) / (new.steps - old.steps) for old, new in pairs]
