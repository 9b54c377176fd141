"""How many requests are inside, and whether more may come in: what a full server, and one that ends, refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from abyssal.serve.protocol.errors import ApiError

_RETRY_FULL = 1
_RETRY_DRAINING = 5


class Gate:
    """Lets requests in until there are ``most``, or the server ends."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.draining = False
        self._inside: dict[object, Callable[[], None]] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running(self) -> int:
        """Requests inside."""
        return len(self._inside)

    @contextmanager
    def inside(self, cut_off: Callable[[], None]) -> Iterator[None]:
        """A request, from its head to the last byte of its answer.

        Args:
            cut_off: ends it, when the server does not wait for it any longer.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise draining()
        if self.running >= self.most:
            message = f"The server has {self.most} requests already; try again later"
            raise ApiError(503, message, code="server_overloaded", retry_after=_RETRY_FULL)
        own = object()
        self._inside[own] = cut_off
        self._empty.clear()
        try:
            yield
        finally:
            del self._inside[own]
            if not self._inside:
                self._empty.set()

    def drain(self) -> None:
        """Nobody comes in any more."""
        self.draining = True

    def cut_off(self) -> None:
        """End all that are inside."""
        for cut_off in [*self._inside.values()]:
            cut_off()

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()


def draining() -> ApiError:
    """To who comes while the server ends."""
    return ApiError(503, "The server is shutting down", code="server_draining", retry_after=_RETRY_DRAINING)
