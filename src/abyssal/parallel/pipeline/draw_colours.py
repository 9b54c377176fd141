"""Colours of the works, the same on a terminal and in a picture.

They are from Okabe and Ito's palette, which eyes that lack one kind of cone still tell apart; what a rank's second
chunk does is the same hue mixed with white, so the two directions also differ in brightness.
"""

from __future__ import annotations

from abyssal.parallel.pipeline.schedule_record import Kind, Schedule

NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
_HUES: dict[Kind, tuple[int, int, int]] = {
    "F": (230, 159, 0),
    "B": (0, 158, 115),
    "I": (86, 180, 233),
    "W": (204, 121, 167),
}
_WHITE = 0.6
"""Share of white in what the second chunk does."""


def colour(kind: Kind, chunk: int) -> str:
    """As ``#rrggbb``; black text is readable on each."""
    white = _WHITE if chunk else 0.0
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in _HUES[kind])


def kinds_of(schedule: Schedule) -> list[Kind]:
    """Those that occur, in the order of the legend."""
    present = {work.kind for _, work in schedule.works()}
    return [kind for kind in NAMES if kind in present]


def directions_of(schedule: Schedule) -> tuple[str, ...]:
    """What a rank's first chunk and its second serve; empty where it has one."""
    if len(schedule.chunks[0]) < 2:
        return ()
    if schedule.num_stages == schedule.num_ranks:
        return "from rank 0 up", f"from rank {schedule.num_ranks - 1} down"
    last = schedule.num_stages - 1
    return f"stages 0 to {schedule.num_ranks - 1}", f"stages {schedule.num_ranks} to {last}"
