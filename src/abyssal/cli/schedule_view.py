"""How ``abyssal schedule`` shows a schedule on a terminal, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abyssal.parallel.pipeline.draw_colours import NAMES, colour, directions_of, kinds_of
from abyssal.parallel.pipeline.draw_text import bands
from abyssal.parallel.pipeline.schedule_figures import ClosedForm, activations
from abyssal.parallel.pipeline.simulate import Timeline

_NARROWEST = 8


def sentence(timeline: Timeline, form: ClosedForm) -> str:
    """Time, bubble and memory on one line."""
    low, high = min(timeline.bubbles()), max(timeline.bubbles())
    bubble = _number(low) if math.isclose(low, high, abs_tol=1e-9) else f"{_number(low)} to {_number(high)}"
    made, held = timeline.schedule, max(activations(timeline.schedule))
    return (
        f"time {_number(timeline.makespan)}, bubble {bubble} ({high / timeline.makespan:.1%}); closed form "
        f"{form.formula} = {_number(form.bubble)}; a rank holds {len(made.chunks[0])} of {made.num_stages} stages and "
        f"activations of up to {held:g} chunks"
    )


def _number(value: float) -> str:
    return f"{value:.6g}"


def show(timeline: Timeline, form: ClosedForm, written: Sequence[Path]) -> None:
    """The drawing, its legend, a table by rank, and the files that were written."""
    console, made = Console(highlight=False), timeline.schedule
    title = f": {made.num_ranks} ranks, {made.num_micro_batches} micro-batches"
    console.print(Text.assemble((made.name, "bold"), title))
    _show_bands(console, timeline)
    console.print()
    console.print(_legend(timeline))
    console.print()
    console.print(_by_rank(timeline))
    console.print()
    console.print(sentence(timeline, form))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _show_bands(console: Console, timeline: Timeline) -> None:
    margin = len(f"rank {timeline.schedule.num_ranks - 1}  ")
    for band in bands(timeline, max(_NARROWEST, console.width - margin)):
        console.print(f"\n{'':<{margin}}time {_number(band.start)} to {_number(band.end)}", style="dim")
        for rank, row in enumerate(band.rows):
            line = Text(f"rank {rank}".ljust(margin))
            for piece in row:
                line.append(piece.text, f"black on {colour(piece.kind, piece.chunk)}" if piece.kind else "dim")
            console.print(line, no_wrap=True, overflow="crop")


def _legend(timeline: Timeline) -> Text:
    made = timeline.schedule
    legend = Text()
    for kind in kinds_of(made):
        legend.append(f" {kind} ", f"black on {colour(kind, 0)}")
        legend.append(f" {NAMES[kind]}   ")
    if any(action.is_pair for actions in made.actions for action in actions):
        legend.append("F+b overlapped")
    directions = directions_of(made)
    if directions:
        legend.append(f"\ncapitals: {directions[0]}; small: {directions[1]}")
    return legend


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("schedule", "closed form") else "right", no_wrap=True)
    return table


def _by_rank(timeline: Timeline) -> Table:
    table = _table("rank", "stages", "busy", "bubble", "activations")
    made = timeline.schedule
    rows = zip(made.chunks, timeline.busy(), timeline.bubbles(), activations(made), strict=True)
    for rank, (stages, busy, bubble, held) in enumerate(rows):
        table.add_row(str(rank), ", ".join(map(str, stages)), _number(busy), _number(bubble), f"{held:g}")
    return table


def show_comparison(num_ranks: int, num_micro_batches: int, rows: dict[str, dict[str, Any]]) -> None:
    """A line a schedule; why one is left out, below."""
    console = Console(highlight=False)
    table = _table("schedule", "time", "bubble", "closed form", "parameters", "activations")
    for name, row in rows.items():
        if "refused" in row:
            table.add_row(name, *["-"] * 5)
            continue
        table.add_row(
            name,
            _number(row["makespan"]),
            _number(row["bubble"]),
            f"{row['bubble_formula']} = {_number(row['bubble_closed_form'])}",
            f"{row['parameters']}/{row['stages']}",
            f"{row['activations']:g}/{row['stages']}",
        )
    console.print(f"{num_ranks} ranks, {num_micro_batches} micro-batches\n")
    console.print(table)
    console.print(
        "\nTimes are those of 1/P of the model; dualpipev's stages are half as large and take half. Parameters: the "
        "share of the model that a rank holds. Activations: the most that a rank holds, beside all that the model "
        "keeps of one micro-batch."
    )
    for row in rows.values():
        if "refused" in row:
            console.print(row["refused"], style="dim")
