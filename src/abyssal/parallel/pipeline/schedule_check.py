"""What holds of every schedule: complete, on the right ranks, in order, and it ends.

Ranks run their actions in the order given and sends never hold the sender up, so whether a schedule ends does not
depend on how long anything takes: it ends if and only if there is an order of all actions in which each comes after
what it needs.  :func:`execution_order` finds one, or names the actions that wait for each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from abyssal.parallel.pipeline.schedule_record import Action, Part, Schedule, Work

Key = tuple[Part, int, int]
"""Something done: which part, of which stage, for which micro-batch."""


class Deadlock(ValueError):
    """Actions that wait for each other, or for what no rank runs."""


def check(schedule: Schedule) -> None:
    """Raise unless every stage takes every micro-batch forward once and backward once, in order and on one rank.

    Backward is ``B``, or ``I`` and later ``W``.

    Raises:
        ValueError: what is missing, twice, on the wrong rank or out of order, and where.
        Deadlock: the schedule would never end.
    """
    _check_shape(schedule)
    places: dict[tuple[int, int], list[tuple[int, Work]]] = defaultdict(list)
    for rank, work in schedule.works():
        _check_place(schedule, rank, work)
        places[work.stage, work.micro_batch].append((rank, work))
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.num_micro_batches):
            _check_passage(schedule, stage, micro_batch, places[stage, micro_batch])
    execution_order(schedule)


def _check_shape(schedule: Schedule) -> None:
    for what, value in (("chunks", schedule.chunks), ("actions", schedule.actions)):
        if len(value) != schedule.num_ranks:
            raise ValueError(
                f"schedule {schedule.name} has {what} of {len(value)} ranks and {schedule.num_ranks} ranks"
            )
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            kinds = [work.kind for work in action.works]
            if len(kinds) != 1 and kinds != ["F", "B"]:
                raise ValueError(
                    f"schedule {schedule.name}, rank {rank}: an action of {kinds or 'no work'}; it is one work, or a "
                    "forward and then the whole backward that overlaps it"
                )


def _check_place(schedule: Schedule, rank: int, work: Work) -> None:
    chunks = schedule.chunks[rank]
    if not 0 <= work.chunk < len(chunks) or chunks[work.chunk] != work.stage:
        raise ValueError(
            f"schedule {schedule.name}, rank {rank}: {work} on chunk {work.chunk}, but the rank's chunks are the "
            f"stages {chunks}"
        )
    if not 0 <= work.micro_batch < schedule.num_micro_batches:
        raise ValueError(f"schedule {schedule.name}, rank {rank}: {work} of {schedule.num_micro_batches}")


def _check_passage(schedule: Schedule, stage: int, micro_batch: int, works: list[tuple[int, Work]]) -> None:
    """One stage and micro-batch: F B or F I W, on one rank, in that order."""
    kinds, ranks = "".join(work.kind for _, work in works), {rank for rank, _ in works}
    if kinds not in ("FB", "FIW") or len(ranks) != 1:
        on = ", ".join(f"{work.kind} on rank {rank}" for rank, work in works) or "nothing"
        raise ValueError(
            f"schedule {schedule.name}, stage {stage}, micro-batch {micro_batch}: {on}; it needs F then B, or F, I "
            "then W, each once and all on one rank"
        )


def execution_order(schedule: Schedule) -> list[tuple[int, int]]:
    """All actions, as rank and place in its list, in an order in which each comes after what it needs.

    Raises:
        Deadlock: there is none; the message names the actions.
    """
    done: set[Key] = set()
    places = [0] * schedule.num_ranks
    waiting: dict[Key, int] = {}
    ready = list(reversed(range(schedule.num_ranks)))
    order: list[tuple[int, int]] = []
    while ready:
        rank = ready.pop()
        for index in range(places[rank], len(schedule.actions[rank])):
            action = schedule.actions[rank][index]
            missing = next((key for key in needed(schedule, action) if key not in done), None)
            if missing is not None:
                waiting[missing] = rank
                break
            order.append((rank, index))
            places[rank] += 1
            for key in made(action):
                done.add(key)
                if key in waiting:
                    ready.append(waiting.pop(key))
    if waiting:
        raise Deadlock(_knot(schedule, places, waiting))
    return order


def needed(schedule: Schedule, action: Action) -> Iterator[Key]:
    """What must be done before the action starts."""
    for work in action.works:
        for part, stage in schedule.needs(work):
            yield part, stage, work.micro_batch


def made(action: Action) -> Iterator[Key]:
    """What is done once the action is."""
    for work in action.works:
        yield "I" if work.kind == "B" else work.kind, work.stage, work.micro_batch


def _knot(schedule: Schedule, places: list[int], waiting: dict[Key, int]) -> str:
    """The actions that wait for each other, rank by rank around the circle."""
    missing_of = {rank: key for key, rank in waiting.items()}
    rank_of = {key: rank for rank, actions in enumerate(schedule.actions) for action in actions for key in made(action)}
    rank, seen = next(iter(missing_of)), list[int]()
    while rank not in seen:
        seen.append(rank)
        rank = rank_of.get(missing_of[rank], -1)
        if rank not in missing_of:
            break  # what it waits for is on no rank
    circle = seen[seen.index(rank) :] if rank in seen else seen[-1:]
    lines = [
        f"rank {rank} waits at action {places[rank]} ({schedule.actions[rank][places[rank]]}) for "
        f"{_described(missing_of[rank])}, {_whose(rank, rank_of.get(missing_of[rank]))}"
        for rank in circle
    ]
    return f"schedule {schedule.name} never ends: " + "; ".join(lines)


def _described(key: Key) -> str:
    part, stage, micro_batch = key
    name = {"F": "the forward", "I": "the input's gradient", "W": "the weights' gradients"}[part]
    return f"{name} of stage {stage} for micro-batch {micro_batch}"


def _whose(waits: int, rank: int | None) -> str:
    if rank is None:
        return "which no rank runs"
    return "which the rank itself runs later" if rank == waits else f"which is rank {rank}'s"
