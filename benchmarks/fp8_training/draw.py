"""The picture: losses of the pairs, and their relative differences with the band of the goal; every seed is a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ablation.draw import COLOURS, GREY

from abyssal.train.plot import save_png

from .arms import BASE

SMOOTHED = 5
"""Windows whose running mean is the thick line of a difference."""
LEAST_SHOWN, MOST_SHOWN = 3, 10
"""Times the goal that the axis of differences reaches, by what the compared steps need; early ones may leave it."""


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw the findings as a PNG, which appears whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 4.8), dpi=130, layout="constrained")
    figure.suptitle(found["title"], fontsize=12)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_losses(left, found)
    _draw_differences(right, found)
    save_png(figure, path)


def _middles(found: dict[str, Any], count: int) -> list[float]:
    return [found["window"] * (number + 0.5) for number in range(count)]


def _draw_losses(axes: Any, found: dict[str, Any]) -> None:
    arms = [name for name in (BASE.name, "fp8") if name in found["arms"]] or list(found["arms"])[:2]
    for name, colour, style in zip(arms, (GREY, *COLOURS), ("-", "--"), strict=False):
        arm = found["arms"][name]
        for number, run in enumerate(arm["runs"].values()):
            label = arm["label"] if number == 0 else None
            axes.plot(_middles(found, len(run["curve"])), run["curve"], style, color=colour, linewidth=1.2, label=label)
    axes.legend(frameon=False, fontsize=9)
    _plain(axes, f"training loss, means of {found['window']} steps, a line a seed", "nats a token")


def _draw_differences(axes: Any, found: dict[str, Any]) -> None:
    goal = 100 * found["goal"]
    axes.axhspan(-goal, goal, color=GREY, alpha=0.15, linewidth=0, label=f"within {goal:g} %")
    axes.axhline(0, color=GREY, linewidth=0.8)
    for each, colour in zip(found["comparisons"], COLOURS * 3, strict=False):
        curves = [[100 * value for value in pair["curve"]] for pair in each["seeds"].values()]
        middles = _middles(found, len(curves[0]))
        for curve in curves:
            axes.plot(middles, smoothed(curve), color=colour, alpha=0.4, linewidth=0.9)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        label = f"{each['label']}: {100 * each['signed']:+.3f} % at the end"
        axes.plot(middles, smoothed(mean), color=colour, linewidth=2.2, label=label)
    first = _mark_last(axes, found)
    largest = max(
        abs(value)
        for line in axes.get_lines()
        for place, value in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if line.get_linestyle() == "-" and place >= first
    )
    limit = min(max(LEAST_SHOWN * goal, 1.5 * largest), MOST_SHOWN * goal)
    axes.set_ylim(-limit, 1.5 * limit)  # room for the legend
    axes.yaxis.set_major_formatter("{x:+.2f} %")
    axes.legend(fontsize=9, loc="upper right", framealpha=0.9, edgecolor="none")
    steps = SMOOTHED * found["window"]
    _plain(axes, f"loss relative to BF16's, running mean of {steps} steps (thin: seeds)", "")


def _mark_last(axes: Any, found: dict[str, Any]) -> float:
    """Mark where the steps that are compared begin, and tell."""
    longest = max(len(run["curve"]) for arm in found["arms"].values() for run in arm["runs"].values())
    first = longest * found["window"] - found["last_steps"]
    axes.axvline(first, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(
        f"last {found['last_steps']}",
        (first, 0.02),
        (4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=9,
        color=GREY,
    )
    return first


def smoothed(values: list[float], count: int = SMOOTHED) -> list[float]:
    """Running mean over ``count`` values around each; fewer at the ends."""
    half = count // 2
    around = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(part) / len(part) for part in around]


def _plain(axes: Any, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
