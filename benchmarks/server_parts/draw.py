"""Pictures of what is saved: load by concurrency, and what serving costs the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_parts.draw import BLUE, GREEN, GREY, ORANGE, Row, new_figure, plain
from engine_parts.results import Results

from abyssal.train.plot import save_png

from .load import concurrencies
from .overhead import KINDS

COLOURS = {"miss": ORANGE, "hit": BLUE}


def draw_all(results: Results) -> list[Path]:
    """Draw every part that has rows."""
    pictures: dict[str, Callable[[Sequence[Row]], Any]] = {"load": load_figure, "overhead": overhead_figure}
    drawn = []
    for part, figure in pictures.items():
        if rows := results.rows(part):
            drawn.append(results.path(part, "png"))
            save_png(figure(rows), drawn[-1])
    return drawn


def load_figure(rows: Sequence[Row]) -> Any:
    """For each preset and dtype: time to first token, between tokens, and requests a second."""
    models = sorted({(row["preset"], row["dtype"]) for row in rows})
    figure, grid = new_figure(
        3, "The server over HTTP, by clients that each wait for their answer", 4.6, 3.8, len(models)
    )
    for panels, model in zip(grid, models, strict=True):
        for row in rows:
            if (row["preset"], row["dtype"]) == model:
                _curves(panels, row)
        _titles(panels, " ".join(model), concurrencies(rows))
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _curves(panels: Any, row: Row) -> None:
    first, token, rate = panels
    clients = [found["clients"] for found in row["loads"]]
    colour = COLOURS[row["prefix"]]
    for axes, name in ((first, "first_token_seconds"), (token, "gap_seconds")):
        for share, style in (("p50", "-o"), ("p99", "--^")):
            values = [found[name][share] * 1e3 for found in row["loads"]]
            axes.plot(clients, values, style, color=colour, markersize=4, label=f"prefix {row['prefix']}, {share}")
    rate.plot(clients, [found["requests_per_second"] for found in row["loads"]], "-o", color=colour, markersize=4)


def _titles(panels: Any, model: str, clients: Sequence[int]) -> None:
    first, token, rate = panels
    plain(first, f"{model}: time to first token", "clients", "milliseconds, logarithmic")
    plain(token, "time between tokens", "clients", "milliseconds, logarithmic")
    plain(rate, "answers", "clients", "requests a second")
    for axes in (first, token):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(each) for each in clients])
        axes.minorticks_off()
    rate.set_ylim(bottom=0)


def overhead_figure(rows: Sequence[Row]) -> Any:
    """Each rate's ratio to the offline API's by batch."""
    figure, (panels,) = new_figure(len(rows), "Tokens a second in the server, times the offline API's", 4.2)
    for axes, row in zip(panels, rows, strict=True):
        names = [str(each["batch"]) for each in row["batches"]]
        for offset, (kind, colour) in zip(
            (-0.27, 0.0, 0.27), zip(KINDS, (BLUE, GREEN, GREY), strict=True), strict=True
        ):
            ratios = [each[f"{kind}_ratio"] for each in row["batches"]]
            places = [number + offset for number in range(len(names))]
            spread = [
                [
                    ratio - min(each[f"{kind}_ratio_of_rounds"])
                    for ratio, each in zip(ratios, row["batches"], strict=True)
                ],
                [
                    max(each[f"{kind}_ratio_of_rounds"]) - ratio
                    for ratio, each in zip(ratios, row["batches"], strict=True)
                ],
            ]
            bars = axes.bar(places, ratios, 0.25, color=colour, label=KINDS[kind])
            axes.errorbar(places, ratios, yerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
            axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=8, label_type="center", color="white")
        axes.axhline(0.95, color="black", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(names)), names)
        plain(axes, f"{row['preset']} {row['dtype']}, {row['threads']} threads", "batch", "ratio")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure
