"""Samples for the board, once a second, and their stream to whoever looks.

A message is written once, however many look.  Who is slow misses samples and gets the newest instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from abyssal.serve.observe.board import Board
from abyssal.serve.observe.history import INTERVAL

MOST_LISTENERS = 64


class BoardFeed:
    """Of one server, while :meth:`run` runs."""

    def __init__(self, board: Board, interval: float = INTERVAL) -> None:
        self._board = board
        self._interval = interval
        self._next = asyncio.Event()
        self._message = b""
        self._closed = False
        self.listeners = 0

    async def run(self) -> None:
        """Take samples until it is cancelled; streams then end."""
        try:
            while True:
                await asyncio.sleep(self._interval)
                self._board.tick()
                if self.listeners:
                    self._message = _event("sample", self._board.sample())
                self._wake()
        finally:
            self.close()

    def close(self) -> None:
        """End every stream; one that begins later has the snapshot alone."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._next = self._next, asyncio.Event()
        waiting.set()

    async def events(self, ending: Callable[[], bool] = lambda: False) -> AsyncGenerator[bytes, None]:
        """Server-sent events: ``snapshot`` with all there is, then ``sample`` after ``sample``.

        Args:
            ending: whether the server is about to end; looked at with each sample.
        """
        self.listeners += 1
        try:
            yield _event("snapshot", self._board.snapshot())
            while not (self._closed or ending()):
                await self._next.wait()
                if not self._closed:
                    yield self._message
        finally:
            self.listeners -= 1


def _event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(body))
