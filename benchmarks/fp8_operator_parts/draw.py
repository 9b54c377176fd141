"""One picture: the error of sums, what an outlier does, and gradients token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abyssal.train.plot import save_png

from .underflow import FORMS

COLOURS = ("#2563a8", "#2e8b57", "#d9731a", "#8b5fbf")
GREY = "#6b7280"
SUMMATIONS = {
    "float32": "FP32",
    "promoted": "14 bits, promoted every 128",
    "tensor_core": "14 bits throughout",
}


def draw(path: Path, data: dict[str, Any]) -> None:
    """Draw the results as a PNG, which appears whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 9.5), dpi=110, layout="constrained")
    figure.suptitle("FP8 on single operators", fontsize=13)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = halves
    above, below = left.subfigures(2, 1)
    for axes, kind, title in zip(
        above.subplots(1, 2, sharey=True),
        ("normal", "uniform"),
        ("normal matrices\n(over the outputs' root mean square)", "uniform in [0, 1)\n(over the output itself)"),
        strict=True,
    ):
        _sums(axes, data["accumulation"], kind)
        axes.set_title(f"largest error of a sum, {title}", fontsize=9, loc="left")
    for axes, name, title in zip(
        below.subplots(1, 2),
        ("flushed", "error"),
        ("values that an outlier makes zero", "relative error of all but the outlier"),
        strict=True,
    ):
        _outlier(axes, data["underflow"], name)
        axes.set_title(title, fontsize=9, loc="left")
    gradients, uneven = right.subplots(2, 1, height_ratios=(2.6, 1))
    _gradients(gradients, data["gradients"])
    _uneven(uneven, data["uneven"])
    save_png(figure, path)


def _sums(axes: Any, records: list[dict[str, Any]], kind: str) -> None:
    for (summation, label), colour in zip(SUMMATIONS.items(), COLOURS, strict=False):
        row = [each for each in records if (each["matrices"], each["summation"]) == (kind, summation)]
        lengths, largest = [each["length"] for each in row], [each["largest"] for each in row]
        axes.plot(lengths, largest, "o-", color=colour, label=label, markersize=4)
        axes.annotate(
            _percent(largest[-1]), (lengths[-1], largest[-1]), (-4, 6), textcoords="offset points", ha="right"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 0.3)
    axes.set_ylim(1e-7, 0.3)
    axes.set_xlabel("length of the sum")
    axes.axhline(0.02, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("2 %", (axes.get_xlim()[0], 0.02), (2, 2), textcoords="offset points", color=GREY, fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.36))
    axes.grid(alpha=0.25)


def _outlier(axes: Any, records: list[dict[str, Any]], name: str) -> None:
    for (form, style), colour in zip(zip(FORMS, ("o-", "s-", "o-", "s--"), strict=True), COLOURS[::-1], strict=True):
        row = [each for each in records if each["format"] == form]
        hollow = style.startswith("s")
        axes.plot(
            [each["outlier"] for each in row],
            [each[name] for each in row],
            style,
            color=colour,
            label=form,
            markersize=9 if hollow else 5,
            fillstyle="none" if hollow else "full",
        )
    axes.set_xscale("log")
    axes.set_xlabel("outlier, in standard deviations")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


def _gradients(axes: Any, records: list[dict[str, Any]]) -> None:
    """A row a layer's product: medians as dots, worst tokens as crosses, of every step."""
    products = sorted({(record["layer"], record["product"]) for record in records})
    kinds = (("weights", GREY, -0.2), ("1x128", COLOURS[0], 0.0), ("128x128", COLOURS[2], 0.2))
    for kind, colour, offset in kinds:
        for statistic, marker in (("median", "o"), ("worst", "x")):
            places = [(each[kind][statistic], products.index((each["layer"], each["product"]))) for each in records]
            label = f"{'weights alone' if kind == 'weights' else kind}, {'worst token' if marker == 'x' else 'median'}"
            axes.plot(
                [place for place, _ in places],
                [row + offset for _, row in places],
                marker,
                color=colour,
                label=label,
                markersize=4,
                alpha=0.8,
            )
    axes.set_yticks(range(len(products)), [f"{layer} {product}" for layer, product in products], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("relative error of a token's dx")
    axes.grid(alpha=0.25, axis="x")
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.05))
    axes.set_title("Dgrad on gradients captured in training, a mark a step", fontsize=9, loc="left")


def _uneven(axes: Any, records: list[dict[str, Any]]) -> None:
    for tile, colour in (("1x128", COLOURS[0]), ("128x128", COLOURS[2])):
        for statistic, style in (("median", "o-"), ("worst", "x--")):
            values = [record[tile][statistic] for record in records]
            label = f"{tile}, {'worst token' if statistic == 'worst' else 'median'}"
            axes.plot([record["factor"] for record in records], values, style, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
    axes.set_xlabel("times by which one token in 128 is made larger")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    first = records[0]
    title = f"the others' error, layer {first['layer']} {first['product']}, one token in 128 made larger"
    axes.set_title(title, fontsize=9, loc="left")


def _percent(value: float) -> str:
    return f"{value:.2g}" if value < 1e-4 else f"{100 * value:.2g} %" if value < 1 else f"{value:.0%}"
