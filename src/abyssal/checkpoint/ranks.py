"""Work that the ranks of a group do together on one folder: each its part, and what fails on one fails on all.

A rank that met an error must not leave the others in a collective that it never joins, nor may they go on as if all
were well.  So every part of the work ends in one exchange: results and errors travel to the group's first rank, whose
verdict all ranks return or raise.  Nothing else is sent; without a group, everything is this process's own.

The objects are pickled between ranks of one program, never read from a file.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

ProcessGroup = distributed.ProcessGroup
T = TypeVar("T")


class Ranks:
    """The ranks of ``group``, or this process alone.

    A thread in the background may use it if nobody else uses the group at the time.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """The result of this rank's ``work``, once all ranks have done theirs.

        Raises:
            OSError, ValueError: ``work`` raised such on some rank; its number comes first in the message.
            RuntimeError: anything else that it raised, with that rank's traceback.
        """
        result, error = _attempt(work)
        self._judge(error)
        return result  # pyright: ignore[reportReturnType]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """As :meth:`together`: the results of all ranks in order, on the first; nothing on the others."""
        result, error = _attempt(work)
        results = self._judge(error, result)
        return results

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, which alone does it; to all ranks."""
        result, error = _attempt(work) if self.is_first else (None, None)
        if self._group is None:
            self._judge(error)
            return result  # pyright: ignore[reportReturnType]
        box: list[Any] = [(result, error and _told(self.rank, error))]
        distributed.broadcast_object_list(box, group=self._group, group_src=0)
        result, told = box[0]
        if told is not None:
            raise told from error
        return result

    def _judge(self, error: Exception | None, result: Any = None) -> list[Any]:
        """Raise on all ranks what is wrong on one; otherwise their results, on the first."""
        if self._group is None:
            if error is not None:
                raise error
            return [result]
        own = None if error is None else _told(self.rank, error)
        answers: list[Any] | None = [None] * self.size if self.is_first else None
        distributed.gather_object((own, None if own else result), answers, group=self._group, group_dst=0)
        box = [next((told for told, _ in answers if told is not None), None) if answers is not None else None]
        distributed.broadcast_object_list(box, group=self._group, group_src=0)
        if box[0] is not None:
            raise box[0] from error
        return [] if answers is None else [answer for _, answer in answers]


class _OfRank:
    """Marks an error that all ranks were told of already."""

    is_told = True


class RankOSError(_OfRank, OSError):
    """The system refused something to one of the ranks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class RankValueError(_OfRank, ValueError):
    """One of the ranks was given something wrong."""


class RankError(_OfRank, RuntimeError):
    """Something else went wrong on one of the ranks."""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _told(rank: int, error: Exception) -> Exception:
    """The error as every rank will raise it."""
    if isinstance(error, _OfRank):
        return error
    if isinstance(error, OSError):
        path = f": {error.filename}" if error.filename else ""
        return RankOSError(error.errno, f"rank {rank}: {error.strerror or error}{path}")
    if isinstance(error, ValueError):
        return RankValueError(f"rank {rank}: {error}")
    return RankError(f"rank {rank}: {''.join(traceback.format_exception(error))}")
