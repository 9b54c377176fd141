"""A timeline as trace events, which ui.perfetto.dev and chrome://tracing open: a track a rank, arrows for messages,
and the activations in flight as a curve.

The format is Chrome's JSON (the "Trace Event Format"): complete events ``X`` with ``ts`` and ``dur`` in microseconds,
flows ``s`` and ``f``, counters ``C``, names ``M``.  A unit of time is drawn as a millisecond.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abyssal.parallel.pipeline.draw_colours import NAMES, directions_of
from abyssal.parallel.pipeline.schedule_check import Key, made, needed
from abyssal.parallel.pipeline.simulate import Span, Timeline

_MICROSECONDS = 1000.0
"""A unit of time."""


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the trace; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(trace(timeline)), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as what its JSON holds."""
    schedule = timeline.schedule
    name = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    events = [_meta("process_name", 0, name=name)]
    for rank, spans in enumerate(timeline.spans):
        events += [_meta("thread_name", rank, name=f"rank {rank}"), _meta("thread_sort_index", rank, sort_index=rank)]
        events += [_slice(timeline, rank, span) for span in spans]
        events += _held(rank, spans)
    events += _messages(timeline)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(what: str, rank: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": rank, "args": arguments}


def _slice(timeline: Timeline, rank: int, span: Span) -> dict[str, Any]:
    """An action.  Viewers colour by name without its numbers, so by kind."""
    directions = directions_of(timeline.schedule)
    works = [
        {
            "kind": NAMES[work.kind],
            "stage": work.stage,
            "micro_batch": work.micro_batch,
            **({"direction": directions[work.chunk]} if directions else {}),
        }
        for work in span.action.works
    ]
    return {
        "ph": "X",
        "name": " + ".join(f"{work.kind} {work.micro_batch}" for work in span.action.works),
        "cat": "pair" if span.action.is_pair else NAMES[span.action.works[0].kind],
        "pid": 0,
        "tid": rank,
        "ts": span.start * _MICROSECONDS,
        "dur": (span.end - span.start) * _MICROSECONDS,
        "args": works[0] if len(works) == 1 else {"forward": works[0], "backward": works[1]},
    }


def _held(rank: int, spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
    """Activations in flight, from the start of a forward to the end of its whole backward."""
    held = 0
    for span in spans:
        for time, kinds, change in ((span.start, "F", 1), (span.end, "BW", -1)):
            works = sum(work.kind in kinds for work in span.action.works)
            if works:
                held += change * works
                yield {
                    "ph": "C",
                    "name": f"activations, rank {rank}",
                    "pid": 0,
                    "tid": rank,
                    "ts": time * _MICROSECONDS,
                    "args": {"chunks": held},
                }


def _messages(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """An arrow for each message between ranks, from the end of the slice that made it to the start of its reader."""
    makers: dict[Key, tuple[int, Span]] = {
        key: (rank, span) for rank, spans in enumerate(timeline.spans) for span in spans for key in made(span.action)
    }
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            for key in needed(timeline.schedule, span.action):
                maker, source = makers[key]
                if maker == rank:
                    continue
                part, stage, micro_batch = key
                common = {
                    "name": "activation" if part == "F" else "gradient",
                    "cat": "message",
                    "id": f"{part} {stage} {micro_batch}",
                    "pid": 0,
                }
                sent = source.end - (source.end - source.start) / 100  # at its end it would be of the next slice
                yield {**common, "ph": "s", "tid": maker, "ts": sent * _MICROSECONDS}
                yield {**common, "ph": "f", "bp": "e", "tid": rank, "ts": span.start * _MICROSECONDS}
