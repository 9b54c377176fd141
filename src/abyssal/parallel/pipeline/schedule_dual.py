"""DualPipe and DualPipeV: two chunks a rank, so that a forward always has a backward to hide its communication behind.

*DualPipe* [V3 section 3.2.1]: micro-batches enter at both ends.  Rank r of P holds stage r and stage P - 1 - r, so each
stage is on two ranks; the first half of the micro-batches goes up from rank 0, the second half down from rank P - 1.

*DualPipeV* (its authors, github.com/deepseek-ai/DualPipe): the same lists for a model cut into 2P stages, folded at the
last rank.  Rank r holds stage r and stage 2P - 1 - r; every micro-batch goes up and comes back.  Nothing is held twice.

Of a rank, *0* is the direction that comes from the near end (DualPipeV: from the first rank), *1* the other.  With H
ranks from the end to the middle (P / 2; DualPipeV: P), the rank the h-th from the end, and n micro-batches a direction
(half of all; DualPipeV: all), a rank runs, as published (`dualpipe.py` and `dualpipev.py` there, commit 3da1bbe):

    1    2 (H - h - 1)     F0
    2    h + 1             F0 F1
    3    H - h - 1         I1 W F1
    4    n - 2H + h + 1    [F0 B1] [F1 B0]     the brackets overlapped, but for the middle rank's first
    5    H - h - 1         B1 [F1 B0]
    6    h + 1             B1 B0               the second half with I for B
    7    H - h - 1         W I0
    8    h + 1             W

W takes the oldest I whose weights' part has not been run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from abyssal.parallel.pipeline.schedule_record import Action, Kind, Schedule, Work

Turn = tuple[tuple[Kind, int], ...]
"""What runs next: one kind and its direction, or two that overlap.  W has no direction of its own: 0 stands there."""


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Micro-batches from both ends.

    Raises:
        ValueError: odd ranks, odd micro-batches, or fewer than two a rank.
    """
    if num_ranks % 2:
        raise ValueError(
            f"schedule dualpipe for {num_ranks} ranks: it feeds micro-batches from both ends and needs an even number "
            "of ranks; give one more or less, or use dualpipev"
        )
    if num_micro_batches % 2 or num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"schedule dualpipe for {num_micro_batches} micro-batches on {num_ranks} ranks: half of them come from "
            f"each end, and it needs at least two a rank; give an even number, {2 * num_ranks} or more"
        )
    half, each = num_ranks // 2, num_micro_batches // 2
    actions = []
    for rank in range(num_ranks):
        # Chunk 0 carries what goes up, chunk 1 what comes down: of the upper half, chunk 1 is on the near side.
        up, down = _Side(0, rank, 0), _Side(1, num_ranks - 1 - rank, each)
        sides = (up, down) if rank < half else (down, up)
        actions.append(_actions(half, min(rank, num_ranks - 1 - rank), each, sides))
    return Schedule(
        name="dualpipe",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        num_stages=num_ranks,
        chunks=tuple((rank, num_ranks - 1 - rank) for rank in range(num_ranks)),
        actions=tuple(actions),
    )


def dualpipe_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Twice as many stages as ranks, folded.

    Raises:
        ValueError: fewer than two micro-batches a rank.
    """
    if num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"schedule dualpipev for {num_micro_batches} micro-batches on {num_ranks} ranks: it needs at least two a "
            f"rank; give {2 * num_ranks} or more"
        )
    last = 2 * num_ranks - 1
    return Schedule(
        name="dualpipev",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        num_stages=2 * num_ranks,
        chunks=tuple((rank, last - rank) for rank in range(num_ranks)),
        actions=tuple(
            _actions(num_ranks, rank, num_micro_batches, (_Side(0, rank, 0), _Side(1, last - rank, 0)))
            for rank in range(num_ranks)
        ),
    )


@dataclass(frozen=True)
class _Side:
    """One direction on one rank: the chunk that serves it, and its first micro-batch."""

    chunk: int
    stage: int
    first: int


def _actions(half: int, place: int, each: int, sides: tuple[_Side, _Side]) -> tuple[Action, ...]:
    """The turns of the rank ``place`` from the end, with their micro-batches."""
    forwards, backwards = Counter[int](), Counter[int]()
    waiting: deque[Work] = deque()

    def work(kind: Kind, direction: int) -> Work:
        if kind == "W":
            done = waiting.popleft()
            return Work("W", done.chunk, done.stage, done.micro_batch)
        side, counter = sides[direction], forwards if kind == "F" else backwards
        made = Work(kind, side.chunk, side.stage, side.first + counter[direction])
        counter[direction] += 1
        if kind == "I":
            waiting.append(made)
        return made

    return tuple(Action(tuple(work(*one) for one in turn)) for turn in _turns(half, place, each))


def _turns(half: int, place: int, each: int) -> Iterator[Turn]:
    """The eight steps; the numbers are the module's head's."""
    inward = half - place - 1
    for _ in range(2 * inward):
        yield (("F", 0),)
    for _ in range(place + 1):
        yield (("F", 0),)
        yield (("F", 1),)
    for _ in range(inward):
        yield (("I", 1),)
        yield (("W", 0),)
        yield (("F", 1),)
    for index in range(each - 2 * half + place + 1):
        if index == 0 and inward == 0:  # overlapped, the first backward of all would end later
            yield (("F", 0),)
            yield (("B", 1),)
        else:
            yield ("F", 0), ("B", 1)
        yield ("F", 1), ("B", 0)
    for _ in range(inward):
        yield (("B", 1),)
        yield ("F", 1), ("B", 0)
    for index in range(2 * (place + 1)):  # B1 and B0 in turn
        yield (("I" if index > place else "B", 1 - index % 2),)
    for _ in range(inward):
        yield (("W", 0),)
        yield (("I", 0),)
    for _ in range(place + 1):
        yield (("W", 0),)
