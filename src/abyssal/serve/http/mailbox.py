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
        self._ended = False
        self._news = asyncio.Event()
        self.error: ApiError | None = None
        """By which the work ended."""

    def put(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        self._waiting += bodies
        self._news.set()

    def end(self, error: ApiError | None = None) -> None:
        self._ended = True
        self.error = error
        self._news.set()

    async def take(self) -> list[Mapping[str, Any]]:
        """All that waits, at least one; nothing only at the end.  One that is cancelled takes nothing."""
        while not self._waiting and not self._ended:
            self._news.clear()
            await self._news.wait()
        taken, self._waiting = self._waiting, []
        return taken
