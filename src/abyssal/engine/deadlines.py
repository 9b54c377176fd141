"""When requests are to end though they are not finished."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Deadlines:
    """Deadlines of requests, the earliest first.

    Args:
        lives: whether a request with this deadline is under way (and not another one, later, of the same number):
            those that have ended are left in the heap until they come up, which costs less than looking for them.
    """

    def __init__(self, lives: Callable[[float, int], bool]) -> None:
        self._lives = lives
        self._heap: list[tuple[float, int]] = []

    def add(self, deadline: float, request_id: int) -> None:
        heappush(self._heap, (deadline, request_id))

    def first(self) -> float | None:
        """The earliest of a request under way; None: there is none."""
        while self._heap and not self._lives(*self._heap[0]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_expired(self, now: float) -> list[int]:
        """Requests under way whose time is over, each told once."""
        expired: list[int] = []
        while (first := self.first()) is not None and first <= now:
            expired.append(heappop(self._heap)[1])
        return expired
