"""Pipeline schedules by name: pure functions of ranks and micro-batches to the actions of each rank, without torch.

What a schedule is, is in ``schedule_record``; the schedules themselves are in ``schedule_straight`` (one chunk a rank)
and ``schedule_dual`` (two chunks a rank, DualPipe and DualPipeV).  To add one, write its function and its line in
:data:`SCHEDULES`; executor, simulator, pictures and tests take it from there.
"""

from __future__ import annotations

from collections.abc import Callable

from abyssal.parallel.pipeline.schedule_dual import dualpipe, dualpipe_v
from abyssal.parallel.pipeline.schedule_record import Action, Kind, Schedule, Work
from abyssal.parallel.pipeline.schedule_straight import gpipe, one_forward_one_backward, zero_bubble

__all__ = ["SCHEDULES", "Action", "Kind", "Schedule", "Work", "schedule"]

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "zb1p": zero_bubble,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}
"""By name, in the order of bubbles."""


def schedule(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule ``name`` of so many ranks and micro-batches.

    Raises:
        ValueError: a name that is none, or numbers that the schedule does not take; it says which it does.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}, which is none: choose one of {', '.join(SCHEDULES)}")
    for what, number in (("ranks", num_ranks), ("micro-batches", num_micro_batches)):
        if number < 1:
            raise ValueError(f"schedule {name} for {number} {what}; give 1 or more")
    return SCHEDULES[name](num_ranks, num_micro_batches)
