"""Ranks that agree through a key-value store, before there is a process group and without one.

Collectives hang where a rank is missing and say little; a store can be asked who came.  What passes here is a few
short JSON texts a run: who is there, what rank 0 did while the others waited, and whether all succeeded.  Waiting for
another rank has no time limit of its own, since text may take hours to prepare: :mod:`abyssal.parallel.watch` notices a
rank that dies or hangs meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")
_FIRST_POLL, _LONGEST_POLL = 0.01, 0.5  # seconds
PROBLEMS = (ValueError, OSError)
"""What bad input and the operating system raise: one line for the user, no traceback."""


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


@dataclass(frozen=True)
class Peer:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int
    machine: str
    """The same for ranks that see one another's process ids."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class RankProblem(ValueError):
    """What went wrong on another rank; that rank, or rank 0, tells the user."""


class OwnProblem(ValueError):
    """What went wrong on this rank where rank 0 does not hear of it: this rank tells the user."""


class Meeting:
    """One rank's side.

    Every rank calls the same methods in the same order; the calls are numbered, and so is what they leave in the store.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._calls = 0

    def roll_call(self, me: Peer, timeout: float, where: str) -> list[Peer]:
        """Everybody's peers by rank, once all have come.

        Args:
            timeout: seconds to wait for them.
            where: the store's address, for the message.

        Raises:
            ValueError: some did not come, or one could not begin and says why.
        """
        self._store.set(f"here/{self.rank}", json.dumps(asdict(me)))
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + timeout
        poll = _FIRST_POLL
        while not self._store.check(keys):
            if self._store.check(["cannot-begin"]):
                raise RankProblem(self._store.get("cannot-begin").decode())
            if time.monotonic() > deadline:
                raise self._missing(keys, timeout, where)
            time.sleep(poll)
            poll = min(2 * poll, _LONGEST_POLL)
        return [Peer(**json.loads(text)) for text in self._store.multi_get(keys)]

    def _missing(self, keys: Sequence[str], timeout: float, where: str) -> ValueError:
        came = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        missing = [rank for rank in range(self.world_size) if rank not in came]
        kind = OwnProblem if came[0] == self.rank else ValueError
        return kind(
            f"{listed_ranks(missing)} of {self.world_size} did not come to {where} within {timeout:g} s, "
            f"{listed_ranks(came)} did; see what the missing ones printed and whether their machines reach that "
            "address, or give them longer with --rank-timeout"
        )

    def cannot_begin(self, problem: str) -> None:
        """Tell the ranks that wait in :meth:`roll_call` that this one will not come, and why."""
        self._store.compare_set("cannot-begin", "", problem)

    def first(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns on rank 0, JSON values; the others wait for it.

        Raises:
            ValueError, OSError: what it raised on rank 0, there.
            RankProblem: the same message, on the others.
        """
        key = self._next("first")
        if self.rank:
            return self._answer(key)
        try:
            value = function()
        except PROBLEMS as problem:
            self._store.set(key, json.dumps({"problem": describe(problem)}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def together(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returns, called on every rank; where one fails all do, with one message.

        Raises:
            ValueError, OSError: what it raised, on rank 0.
            RankProblem: the message of the first rank that failed, on the others.
        """
        key = self._next("together")
        problem: ValueError | OSError | None = None
        value: list[Value] = []
        try:
            value.append(function())
        except PROBLEMS as raised:
            problem = raised
        self._store.set(f"{key}/{self.rank}", "" if problem is None else describe(problem))
        if self.rank == 0:
            texts = self._all(key)
            failed = [rank for rank, text in enumerate(texts) if text]
            told = "" if not failed else texts[0] or f"rank {failed[0]}: {texts[failed[0]]}"
            self._store.set(key, json.dumps({"problem": told} if failed else {"value": None}))
        self._answer(key, problem if self.rank == 0 else None)
        return value[0]

    def gather(self, text: str) -> list[str] | None:
        """Every rank's text by rank, on rank 0; None elsewhere."""
        key = self._next("gather")
        self._store.set(f"{key}/{self.rank}", text)
        return self._all(key) if self.rank == 0 else None

    def _all(self, key: str) -> list[str]:
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        self._wait(keys)
        return [text.decode() for text in self._store.multi_get(keys)]

    def _answer(self, key: str, own: Exception | None = None) -> Any:
        self._wait([key])
        answer = json.loads(self._store.get(key))
        if "problem" in answer:
            raise own or RankProblem(answer["problem"])
        return answer["value"]

    def _next(self, kind: str) -> str:
        self._calls += 1
        return f"{kind}/{self._calls}"

    def _wait(self, keys: list[str]) -> None:
        poll = _FIRST_POLL
        while not self._store.check(keys):
            time.sleep(poll)
            poll = min(2 * poll, _LONGEST_POLL)


def describe(problem: Exception) -> str:
    """What the operating system refused, without its number; the message of any other error."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return str(problem)
    return problem.strerror if problem.filename is None else f"{problem.filename}: {problem.strerror}"


def listed_ranks(ranks: Sequence[int]) -> str:
    """``ranks 0-3, 7``, or ``no rank``."""
    if not ranks:
        return "no rank"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
