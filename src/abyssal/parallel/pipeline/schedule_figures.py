"""What a schedule costs: activations in flight, counted; bubbles and bounds, in closed form [V3 table 2].

Unit of activations: what one chunk keeps of one micro-batch from its forward until its backward is done.  A chunk is
one stage, 1 / num_stages of the model, so ranks of DualPipe hold chunks as large as those of 1F1B on as many ranks, and
those of DualPipeV half as large.
"""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.parallel.pipeline.schedule_record import Schedule


def activations(schedule: Schedule, kept_for_weights: float = 1.0) -> tuple[float, ...]:
    """By rank, the most activations in flight.

    They are held from the start of the forward to the end of the whole backward.  Of a backward in two parts, all are
    held until the input's part ends, and the share ``kept_for_weights`` from there until the weights' part ends: 1, as
    counted by default, is the most that an executor could need, which frees nothing in between.  The forward of a pair
    starts before its backward has freed anything.
    """
    return tuple(_most(schedule, rank, kept_for_weights) for rank in range(schedule.num_ranks))


def _most(schedule: Schedule, rank: int, kept_for_weights: float) -> float:
    freed = {"F": 0.0, "B": 1.0, "I": 1.0 - kept_for_weights, "W": kept_for_weights}
    held = most = 0.0
    for action in schedule.actions[rank]:
        held += sum(work.kind == "F" for work in action.works)
        most = max(most, held)
        held -= sum(freed[work.kind] for work in action.works)
    return most


@dataclass(frozen=True)
class ClosedForm:
    """The published figures of a schedule, and the formula of its bubble."""

    bubble: float
    """Of every rank, in the unit of the times."""
    formula: str
    activations: int
    """The most that any rank holds, in chunks."""


def closed_form(
    schedule: Schedule, forward: float = 1.0, input: float = 1.0, weight: float = 1.0, pair: float | None = None
) -> ClosedForm:
    """The table's figures for these times; ``pair`` is forward + input + weight by default.

    In the formulas B is the whole backward, input + weight, F&B an overlapped pair, P the ranks.  Those of GPipe and
    1F1B hold whatever the times.  The others are exact where forward, input and weight are equal and a pair takes as
    long as its two parts one after the other; with other times ranks differ, and :func:`simulate` says by how much.
    """
    ranks, backward = schedule.num_ranks, input + weight
    both = forward + backward if pair is None else pair
    if schedule.name in ("gpipe", "1f1b"):
        held = schedule.num_micro_batches if schedule.name == "gpipe" else ranks
        return ClosedForm((ranks - 1) * (forward + backward), "(P-1)(F+B)", held)
    if schedule.name == "zb1p":
        return ClosedForm((ranks - 1) * (forward + backward - 2 * weight), "(P-1)(F+B-2W)", ranks)
    one = both + backward - 3 * weight
    if schedule.name == "dualpipe":
        return ClosedForm((ranks // 2 - 1) * one, "(P/2-1)(F&B+B-3W)", ranks + 1)
    if schedule.name == "dualpipev":
        return ClosedForm((ranks - 1) * one, "(P-1)(F&B+B-3W)", 2 * ranks + 1)
    raise ValueError(f"there is no closed form for schedule {schedule.name!r}")
