"""A timer that notices quiet: one of the event loop's a request, where a time limit around every wait would be many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pulse:
    """Calls ``quiet`` whenever nothing has happened for so many seconds."""

    def __init__(self, seconds: float, quiet: Callable[[], None]) -> None:
        self._seconds = seconds
        self._quiet = quiet
        self._loop = asyncio.get_running_loop()
        self._at = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._beat)

    def touch(self) -> None:
        """Something happens."""
        self._at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        now = self._loop.time()
        if self._at + self._seconds <= now:
            self._at = now
            self._quiet()
        self._timer = self._loop.call_later(self._at + self._seconds - now, self._beat)
