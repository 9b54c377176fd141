"""A timeline as a picture: a line a rank, a box a work with its micro-batch, as in the papers' figures.

matplotlib is imported when a picture is asked for: it is an extra (``pip install 'abyssal[plot]'``).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abyssal.parallel.pipeline.draw_colours import NAMES, colour, directions_of, kinds_of
from abyssal.parallel.pipeline.schedule_figures import activations
from abyssal.parallel.pipeline.schedule_record import Work
from abyssal.parallel.pipeline.simulate import Span, Timeline

_IDLE, _EDGE, _FRAME = "#eceef1", "#ffffff", "#1f2937"
_INCHES_PER_WORK, _NARROWEST, _WIDEST = 0.25, 9.0, 40.0
_POINTS_PER_DIGIT = 0.62
"""Width of a digit, by the size of the font."""


def draw(timeline: Timeline, path: Path, subtitle: str = "") -> None:
    """Write the picture; the file's ending says which kind, ``.png`` or ``.svg``, and it appears whole or not at all.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed, and the picture needs it: pip install 'abyssal[plot]'")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context({"svg.hashsalt": "abyssal"}):  # the same file from the same schedule
        figure = _figure(timeline, subtitle)
        FigureCanvasAgg(figure)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        kind = path.suffix.lower().removeprefix(".")
        try:
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _figure(timeline: Timeline, subtitle: str) -> Any:
    from matplotlib.figure import Figure

    schedule = timeline.schedule
    lengths = [span.end - span.start for spans in timeline.spans for span in spans if span.end > span.start]
    unit = sorted(lengths)[len(lengths) // 10] if lengths else 1.0
    width = min(_WIDEST, max(_NARROWEST, _INCHES_PER_WORK * timeline.makespan / unit))
    figure = Figure(figsize=(width + 1.6, 1.9 + 0.36 * schedule.num_ranks), dpi=110, layout="constrained")
    axes = figure.subplots()
    points = 72 * width / (timeline.makespan or 1.0)
    for rank, spans in enumerate(timeline.spans):
        axes.broken_barh([(0, timeline.makespan)], (rank - 0.42, 0.84), facecolor=_IDLE, zorder=0)
        for span in spans:
            _draw_span(axes, span, rank, timeline, points)
    _label(axes, timeline, subtitle)
    return figure


def _draw_span(axes: Any, span: Span, rank: int, timeline: Timeline, points: float) -> None:
    length = span.end - span.start
    parts = [1.0 if work.kind == "F" else 2.0 for work in span.action.works]
    start = span.start
    for work, part in zip(span.action.works, parts, strict=True):
        piece = length * part / sum(parts)
        axes.broken_barh(
            [(start, piece)],
            (rank - 0.42, 0.84),
            facecolor=colour(work.kind, work.chunk),
            edgecolor=_EDGE,
            linewidth=0.5,
            zorder=1,
        )
        _draw_number(axes, work, start + piece / 2, rank, piece * points, timeline)
        start += piece
    if span.action.is_pair:
        axes.broken_barh(
            [(span.start, length)], (rank - 0.42, 0.84), facecolor="none", edgecolor=_FRAME, linewidth=1.1, zorder=2
        )


def _draw_number(axes: Any, work: Work, x: float, rank: int, points: float, timeline: Timeline) -> None:
    """The micro-batch, in one size for all where the narrowest box has room for it."""
    digits = len(str(timeline.schedule.num_micro_batches - 1))
    size = min(9.0, points / _POINTS_PER_DIGIT / (digits + 0.3))
    if size >= 4:
        axes.text(x, rank, str(work.micro_batch), ha="center", va="center_baseline", fontsize=size, zorder=3)


def _label(axes: Any, timeline: Timeline, subtitle: str) -> None:
    schedule = timeline.schedule
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    held = axes.secondary_yaxis("right")
    held.set_yticks(range(schedule.num_ranks), [f"holds {most:g}" for most in activations(schedule)])
    held.tick_params(axis="y", length=0)
    held.spines["right"].set_visible(False)
    title = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    axes.set_title(f"{title}\n{subtitle}" if subtitle else title, loc="left", fontsize=11)
    axes.figure.legend(handles=_legend(timeline), loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def _legend(timeline: Timeline) -> list[Any]:
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    directions = directions_of(schedule)
    handles = []
    for chunk, direction in enumerate(directions or ("",)):
        present = {work.kind for _, work in schedule.works() if work.chunk == chunk}
        for kind in kinds_of(schedule):
            if kind in present:
                label = f"{NAMES[kind]}: {direction}" if direction else NAMES[kind]
                handles.append(Patch(facecolor=colour(kind, chunk), label=label))
    if any(action.is_pair for actions in schedule.actions for action in actions):
        handles.append(Patch(facecolor="none", edgecolor=_FRAME, label="overlapped pair"))
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    return handles
