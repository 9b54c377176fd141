"""The picture of what is saved: for each case the bytes of a token across and the time, way by way."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from abyssal.train.plot import save_png

from .rank import PHASES, PLAIN, TUNED
from .table import name_of

BLUE, ORANGE, GREY, LIGHT = "#2563a8", "#d9731a", "#6b7280", "#c3c9d2"
COLOURS = dict(zip(PHASES, (GREY, BLUE, ORANGE), strict=True))


def draw(data: dict[str, Any], path: Path) -> None:
    """A row of two charts for each case of ``data``, as a PNG."""
    from matplotlib.figure import Figure

    cases = data["cases"]
    heights = [1.1 + 0.34 * len(case["rows"]) for case in cases]
    figure = Figure(figsize=(12, sum(heights) + 0.5), dpi=130, layout="constrained")
    figure.suptitle("Dispatch (FP8) and combine (BF16) between nodes with slow links", fontsize=12)
    grid: Any = figure.subplots(
        len(cases), 2, squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": (1, 1.5)}
    )
    for case, (left, right) in zip(cases, grid, strict=True):
        names = [name_of(row["way"], row["chunk_tokens"]) for row in case["rows"]]
        _bytes(left, case, names)
        _times(right, case)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", alpha=0.25)
            axes.set_axisbelow(True)
            axes.invert_yaxis()
            axes.margins(x=0.16)
    grid[-1][0].set_xlabel("KiB of a token across nodes, there and back")
    grid[-1][1].set_xlabel("milliseconds, median of the slowest rank (whiskers: the middle half of the rounds)")
    grid[0][0].legend(fontsize=8, frameon=False, loc="lower right")
    save_png(figure, path)


def _bytes(axes: Any, case: dict[str, Any], names: list[str]) -> None:
    """Bars of what the dispatcher counted, and marks of what the interfaces saw."""
    setting = case["setting"]
    left = [0.0] * len(names)
    for phase in PHASES:
        sizes = [row["counted"][phase]["across"] / 1024 for row in case["rows"]]
        axes.barh(names, sizes, left=left, color=COLOURS[phase], label=phase)
        left = [sum(pair) for pair in zip(left, sizes, strict=True)]
    link = [row["link_bytes"] / 1024 for row in case["rows"]]
    axes.plot(link, names, "|", color="black", markersize=9)
    for name, size, row in zip(names, link, case["rows"], strict=True):
        axes.annotate(
            f"{row['copies_across']:.2f} copies",
            (size, name),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_title(
        f"{setting['nodes']} nodes × {setting['ranks_per_node']} ranks, at most {setting['kept_nodes']} nodes a token"
        " (| interfaces)",
        fontsize=9,
        loc="left",
    )
    axes.tick_params(axis="y", labelsize=8)


def _times(axes: Any, case: dict[str, Any]) -> None:
    rows = case["rows"]
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for phase in PHASES:
        times = [statistics.median(row["milliseconds"][phase]) for row in rows]
        axes.barh(places, times, left=left, color=COLOURS[phase])
        left = [sum(pair) for pair in zip(left, times, strict=True)]
    for place, row, end in zip(places, rows, left, strict=True):
        rounds = sorted(sum(phases) for phases in zip(*row["milliseconds"].values(), strict=True))
        middle = rounds[len(rounds) // 4], rounds[-1 - len(rounds) // 4]
        axes.plot(middle, [place, place], color="black", linewidth=0.9)
        text = f"{row['share_of_link']:.0%} of the link"
        if row["way"] != PLAIN:
            text = f"{row['speedup']:.2f}×, {text}"
        weight = "bold" if row["way"] == TUNED else "normal"
        axes.annotate(
            text, (max(end, *middle), place), (5, 0), textcoords="offset points", va="center", fontsize=8, weight=weight
        )
    axes.set_yticks(places, [""] * len(rows))
    link = "as asked for, in user space" if case["kind"] == "limiter" else "measured"
    axes.set_title(f"a node's cable: {case['across']['gigabits']:.2f} Gbit/s {link}", fontsize=9, loc="left")
