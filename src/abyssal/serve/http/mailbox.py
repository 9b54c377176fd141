"""Between a work that runs and a client that reads: what was made and not yet taken, and how the work ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from abyssal.serve.protocol.errors import ApiError


class Mailbox:
    """Of one request.  It holds no more than one answer, so it needs no bound of its own."""

    def __init__(self) -> None:
        self._waiting: list[Mapping[str, Any]] = []
        self._nudged = False
        self.ended = False
        self._news = asyncio.Event()
        self.error: ApiError | None = None
        """By which the work ended."""

    def put(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        self._waiting += bodies
        self._news.set()

    def end(self, error: ApiError | None = None) -> None:
        self.ended = True
        self.error = error
        self._news.set()

    def nudge(self) -> None:
        """Have the reader look up, though there is nothing."""
        self._nudged = True
        self._news.set()

    async def take(self) -> list[Mapping[str, Any]]:
        """All that waits, at least one; nothing at the end, or when nudged.  One that is cancelled takes nothing."""
        while not (self._waiting or self.ended or self._nudged):
            self._news.clear()
            await self._news.wait()
        self._nudged = False
        taken, self._waiting = self._waiting, []
        return taken
