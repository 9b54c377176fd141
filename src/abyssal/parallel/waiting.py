"""Seconds that a rank waits for the others: what its own time of a step is without, and what shows a slow one."""

from __future__ import annotations

import time
from collections.abc import Callable


class Waiting:
    """Adds up the time spent inside it, as a context manager; one thread at a time enters."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._clock() - self._began

    def take(self) -> float:
        """The seconds since it was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
