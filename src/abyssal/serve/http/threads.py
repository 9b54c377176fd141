"""Threads for what would hold up the event loop: making requests ready, and the accounts' file.

Reading a body, writing out its conversation and turning it into tokens takes a millisecond as a rule, and seconds where
the body has megabytes; so large bodies have one thread of their own, and never stand before small ones.  Both are
bounded: what comes faster waits in line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from abyssal.serve.http.body import SMALL_BYTES

Result = TypeVar("Result")


class Threads:
    """Of one server."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(2, "prepare")
        self._large = ThreadPoolExecutor(1, "prepare-large")
        self._desk = ThreadPoolExecutor(4, "desk")

    async def prepare(self, num_bytes: int, function: Callable[[], Result]) -> Result:
        """Of a body of so many bytes."""
        pool = self._small if num_bytes <= SMALL_BYTES else self._large
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    async def desk(self, function: Callable[[], Result]) -> Result:
        """What may wait for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._desk, function)

    def close(self) -> None:
        """Wait for none of those that are at work."""
        for pool in (self._small, self._large, self._desk):
            pool.shutdown(wait=False, cancel_futures=True)
