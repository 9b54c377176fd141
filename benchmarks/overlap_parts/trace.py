"""One overlapped step as trace events, which ui.perfetto.dev opens: a rank has tracks of works, moves and what travels.

A communication is drawn from when it was started, or when the one before it on the rank's lane ended, to its end.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .notes import Note

TRACKS = ("works", "moves", "communication")


def write_trace(notes: Sequence[dict[str, list[Note]]], path: Path) -> None:
    """Of each rank's notes; as ``.json.gz``, alike for alike notes."""
    data = json.dumps({"traceEvents": trace(notes), "displayTimeUnit": "ms"}, separators=(",", ":"))
    path.write_bytes(gzip.compress(data.encode(), 9, mtime=0))


def trace(notes: Sequence[dict[str, list[Note]]]) -> list[dict[str, Any]]:
    """The events, whose times begin with the first work."""
    began = min(note[1] for each in notes for note in each["works"])
    events: list[dict[str, Any]] = []
    for rank, each in enumerate(notes):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        kinds = (each["works"], each["moves"], one_at_a_time(each["sent"]))
        for track, (name, found) in enumerate(zip(TRACKS, kinds, strict=True)):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}})
            events += [_slice(rank, track, note, began) for note in found]
    return events


def one_at_a_time(sent: Sequence[Note]) -> list[Note]:
    """As the lane has it: first in, first out, so none begins before the one before it has ended."""
    found, free = [], 0.0
    for what, began, ended in sorted(sent, key=lambda note: note[1]):
        found.append((what, max(began, free), ended))
        free = ended
    return found


def _slice(rank: int, track: int, note: Note, began: float) -> dict[str, Any]:
    what, start, end = note
    return {
        "ph": "X",
        "name": what,
        "pid": rank,
        "tid": track,
        "ts": round((start - began) * 1e6),
        "dur": round((end - start) * 1e6),
    }
