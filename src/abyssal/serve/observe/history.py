"""The last minutes, a sample a second: what the board draws as lines.

Counts become rates here, so that whoever opens the board sees the same lines as whoever had it open.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from abyssal.engine.wire import Statistics
from abyssal.serve.observe.figures import Figures

INTERVAL = 1.0
"""Seconds between samples."""
KEPT = 600
"""Samples: ten minutes."""
RATE_SAMPLES = 4
"""Seconds that a rate is of: prompts are counted all at once, and one alone would be a spike."""
DRAFT_SAMPLES = 60
"""Over how many the board says how often drafts were accepted."""


@dataclass(frozen=True)
class Sample:
    """How the server stood at one moment, and how fast in the last :data:`RATE_SAMPLES` seconds."""

    time: float
    """Seconds since the epoch."""
    output_rate: float
    """Tokens a second, as all rates."""
    prompt_rate: float
    memory_rate: float
    """Prompt tokens found in memory."""
    disk_rate: float
    computed_rate: float
    running: int
    waiting: int
    pages: float
    """Share of them in use."""
    used_pages: int
    total_pages: int
    first_token: float | None
    """Median seconds to a first token, of the last half minute; None without requests."""
    between_tokens: float | None
    """Mean seconds between tokens, as rates; None without tokens."""
    busy: float
    """Share of the time that the engine spent in steps, as rates."""


@dataclass(frozen=True)
class Drafts:
    """Drafts at one position, verified and accepted."""

    drafted: int
    accepted: int


class History:
    """Samples, oldest first.

    Args:
        clock: seconds since the epoch, to show.
        ticks: seconds that never run backwards, to divide by.
    """

    def __init__(
        self,
        figures: Figures,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._figures = figures
        self._clock = clock
        self._ticks = ticks
        self._before = deque([(ticks(), Statistics(), figures.between_tokens())], maxlen=RATE_SAMPLES)
        self._drafts: deque[Statistics] = deque([Statistics()], maxlen=DRAFT_SAMPLES + 1)
        self.samples: deque[Sample] = deque(maxlen=KEPT)

    def take(self, now: Statistics) -> Sample:
        """A sample.  ``now`` has counts that never fall."""
        at, between = self._ticks(), self._figures.between_tokens()
        before_at, before, (before_sum, before_count) = self._before[0]
        seconds = max(at - before_at, 1e-6)

        def rate(name: str) -> float:
            return round((getattr(now, name) - getattr(before, name)) / seconds, 3)

        prompt, memory, disk = rate("prompt_tokens"), rate("memory_hit_tokens"), rate("disk_hit_tokens")
        tokens = between[1] - before_count
        sample = Sample(
            time=round(self._clock(), 3),
            output_rate=rate("output_tokens"),
            prompt_rate=prompt,
            memory_rate=memory,
            disk_rate=disk,
            computed_rate=max(0.0, round(prompt - memory - disk, 3)),
            running=now.running,
            waiting=now.waiting,
            pages=round(now.used_pages / now.total_pages, 4) if now.total_pages else 0.0,
            used_pages=now.used_pages,
            total_pages=now.total_pages,
            first_token=_rounded(self._figures.recent_first_token()),
            between_tokens=_rounded((between[0] - before_sum) / tokens) if tokens else None,
            busy=min(1.0, rate("step_seconds")),
        )
        self._before.append((at, now, between))
        if now.drafted != self._drafts[-1].drafted:
            self._drafts.append(now)
        self.samples.append(sample)
        return sample

    def drafts(self) -> list[Drafts]:
        """By position, over the last samples in which drafts were verified."""
        first, last = self._drafts[0], self._drafts[-1]
        before = [*first.drafted, *[0] * len(last.drafted)], [*first.accepted, *[0] * len(last.drafted)]
        return [
            Drafts(drafted - before[0][position], accepted - before[1][position])
            for position, (drafted, accepted) in enumerate(zip(last.drafted, last.accepted, strict=False))
        ]

    def columns(self) -> dict[str, list[Any]]:
        """By name, for a message that says each name once."""
        return {field.name: [getattr(sample, field.name) for sample in self.samples] for field in fields(Sample)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
