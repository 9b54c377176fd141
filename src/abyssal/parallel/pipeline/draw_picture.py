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
_INCHES_PER_WORK, _WIDEST = 0.25, 40.0
_NARROWEST = (9.0, 13.0)
"""With one chunk a rank and with two, whose legend is longer."""
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
    width = min(_WIDEST, max(_NARROWEST[len(schedule.chunks[0]) - 1], _INCHES_PER_WORK * timeline.makespan / unit))
    figure = Figure(figsize=(width + 2.0, 1.9 + 0.36 * schedule.num_ranks), dpi=110, layout="constrained")
    axes = figure.subplots()
    points = 72 * width / (timeline.makespan or 1.0)
    for rank, spans in enumerate(timeline.spans):
        _draw_box(axes, 0, timeline.makespan, rank, facecolor=_IDLE, zorder=0)
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
        _draw_box(axes, start, piece, rank, facecolor=colour(work.kind, work.chunk), edgecolor=_EDGE, linewidth=0.5)
        _draw_number(axes, work, start + piece / 2, rank, piece * points, timeline)
        start += piece
    if span.action.is_pair:
        _draw_box(axes, span.start, length, rank, facecolor="none", edgecolor=_FRAME, linewidth=1.1, zorder=2)


def _draw_box(axes: Any, start: float, length: float, rank: int, **look: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_artist(Rectangle((start, rank - 0.42), length, 0.84, in_layout=False, **look))


def _draw_number(axes: Any, work: Work, x: float, rank: int, points: float, timeline: Timeline) -> None:
    """The micro-batch, in one size for all where the narrowest box has room for it."""
    digits = len(str(timeline.schedule.num_micro_batches - 1))
    size = min(9.0, points / _POINTS_PER_DIGIT / (digits + 0.3))
    if size >= 4:
        # In no layout: it is inside its box, and thousands of them would be measured.
        text = axes.text(x, rank, str(work.micro_batch), ha="center", va="center_baseline", fontsize=size, zorder=3)
        text.set_in_layout(False)


def _label(axes: Any, timeline: Timeline, subtitle: str) -> None:
    schedule = timeline.schedule
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    held = axes.secondary_yaxis("right")
    held.set_yticks(range(schedule.num_ranks), [f"holds {most:g} chunks" for most in activations(schedule)])
    held.tick_params(axis="y", length=0)
    held.spines["right"].set_visible(False)
    title = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"
    axes.set_title(f"{title}\n{subtitle}" if subtitle else title, loc="left", fontsize=11)
    handles = _legend(timeline)
    rows = len(schedule.chunks[0])
    axes.figure.legend(
        handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), frameon=False, fontsize=9
    )


def _legend(timeline: Timeline) -> list[Any]:
    """A column a kind, the first direction above the second."""
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    handles = []
    for kind in kinds_of(schedule):
        for chunk, direction in enumerate(directions_of(schedule) or ("",)):
            label = f"{NAMES[kind]}: {direction}" if direction else NAMES[kind]
            handles.append(Patch(facecolor=colour(kind, chunk), label=label))
    if any(action.is_pair for actions in schedule.actions for action in actions):
        handles.append(Patch(facecolor="none", edgecolor=_FRAME, label="overlapped pair"))
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    return handles
