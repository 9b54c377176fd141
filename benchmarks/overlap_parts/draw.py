"""The picture of what is saved: steps in the three ways, where an overlapped step still waits, sleeping ranks, and two
pairs of one rank as they ran."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

from abyssal.train.plot import save_png

from .rank import NONE, OVERLAPPED, SERIAL, WAYS
from .table import NAMES

BLUE, ORANGE, GREY, GREEN, LIGHT, RED = "#2563a8", "#d9731a", "#6b7280", "#3f8f4f", "#c3c9d2", "#b3362b"
MOVE_COLOURS = {"F": ORANGE, "B": GREEN, "weight": BLUE, "wait": RED}


def draw(data: dict[str, Any], trace: Path, path: Path) -> None:
    """From the data saved and the trace beside it, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.4), dpi=130, layout="constrained")
    found = data["overlap"]
    figure.suptitle(
        f"Two ranks, experts on both, communication {found['ratio']:.2f} of computation: "
        f"{found['hidden_of_step']:.0%} of it hidden",
        fontsize=12,
    )
    grid = figure.add_gridspec(2, 3, width_ratios=(1.25, 1, 1), height_ratios=(1.25, 1))
    _steps(figure.add_subplot(grid[0, 0]), found)
    _waits(figure.add_subplot(grid[0, 1]), found)
    _sleeping(figure.add_subplot(grid[0, 2]), data["sleeping"])
    _timeline(figure.add_subplot(grid[1, :]), json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
    save_png(figure, path)


def _steps(axes: Any, found: dict[str, Any]) -> None:
    medians = [statistics.median(found["seconds"][way]) for way in WAYS]
    axes.bar(range(3), medians, color=[GREY, BLUE, LIGHT], width=0.62)
    for place, way in enumerate(WAYS):
        axes.plot([place] * len(found["seconds"][way]), found["seconds"][way], "_", color="black", markersize=7)
        above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{medians[place]:.2f} s", (place, max(found["seconds"][way])), **above)
    axes.set_xticks(range(3), [NAMES[way].replace(" ", "\n", 1) for way in WAYS], fontsize=9)
    axes.set_ylim(0, 1.15 * max(medians))
    _plain(axes, "a step (− rounds)", "seconds")


def _waits(axes: Any, found: dict[str, Any]) -> None:
    added = statistics.median(found["seconds"][SERIAL]) - statistics.median(found["seconds"][NONE])
    used = found["processor"][OVERLAPPED]
    parts = {move: seconds for move, seconds in found["waits"].items()}
    shares = {
        **{f"{move}": 100 * seconds / added for move, seconds in parts.items()},
        "works without a pair": 100 * (1 - found["share_in_pairs"]),
        "processor: threads": 100 * used["other_threads"] / added,
        "processor: interrupts": 100 * used["interrupts"] / added,
    }
    colours = [RED] * len(parts) + [GREY, BLUE, BLUE]
    axes.barh(list(shares), list(shares.values()), color=colours)
    for name, share in shares.items():
        axes.annotate(f"{share:.1f}", (share, name), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.tick_params(axis="y", labelsize=8)
    _plain(axes, "what is not hidden, and what cannot be", "")
    axes.set_xlabel("% of the time that communication adds")


def _sleeping(axes: Any, found: list[dict[str, Any]]) -> None:
    places = range(len(found))
    simulated, executed = (
        [one["simulator"] for one in found],
        [statistics.median(one["executor"]) for one in found],
    )
    axes.bar([place - 0.2 for place in places], simulated, 0.38, color=LIGHT, label="simulator")
    axes.bar([place + 0.2 for place in places], executed, 0.38, color=BLUE, label="executor")
    for place, one in zip(places, found, strict=True):
        axes.annotate(
            f"{one['excess']:+.1%}", (place + 0.2, executed[place]), (0, 3), textcoords="offset points", ha="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_xticks(places, [one["name"] for one in found])
    axes.set_ylim(0, 1.3 * max(executed))
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    _plain(axes, "four ranks that sleep", "seconds")


def _timeline(axes: Any, events: list[dict[str, Any]]) -> None:
    """Rank 0's two pairs in the middle of the step."""
    mine = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    pairs = [event for event in mine if event["name"].startswith("pair")]
    first, second = pairs[len(pairs) // 2 : len(pairs) // 2 + 2] or (mine[0], mine[-1])
    begin, end = first["ts"], second["ts"] + second["dur"]
    for event in mine:
        left, right = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        if event["tid"] == 0 or right <= left:
            continue
        line = {1: 1.0, 2: 0.0}[event["tid"]]
        words = event["name"].split()
        kind = words[1] if words[1] in MOVE_COLOURS else words[0]
        colour = MOVE_COLOURS[kind] if event["tid"] == 1 else {"F": ORANGE, "B": GREEN}[words[0]]
        axes.barh(line, (right - left) / 1000, 0.62, (left - begin) / 1000, color=colour, edgecolor="white", lw=0.4)
        if right - left > (end - begin) / 60:
            label = words[-1].removeprefix("attention_") if event["tid"] == 1 else event["name"]
            middle = (left + right) / 2000 - begin / 1000
            axes.annotate(label, (middle, line), ha="center", va="center", fontsize=6, color="white", rotation=90)
    axes.set_yticks([0, 1], ["travels", "computes"])
    axes.set_xlim(0, (end - begin) / 1000)
    _plain(axes, "two pairs on rank 0: forward orange, backward green, weights blue, waiting red", "")
    axes.set_xlabel("milliseconds")


def _plain(axes: Any, title: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
