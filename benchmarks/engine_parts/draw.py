"""Pictures of what is saved: decoding, service under load, the disk cache, speculation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abyssal.train.plot import save_png

from .results import Results

BLUE, ORANGE, GREEN, GREY, LIGHT = "#2563a8", "#d9731a", "#2e8b57", "#6b7280", "#c3c9d2"
SERIES = (BLUE, "#7fa8d6", ORANGE, "#efb686", GREEN, "#8fc4a6", GREY, LIGHT)
Row = dict[str, Any]


def draw_all(results: Results) -> list[Path]:
    """Draw every part that has rows."""
    pictures: dict[str, Callable[[Sequence[Row]], Any]] = {
        "decode": decode_figure,
        "traces": serving_figure,
        "disk": disk_figure,
        "speculation": speculation_figure,
    }
    drawn = []
    for part, figure in pictures.items():
        if rows := results.rows(part):
            drawn.append(results.folder / f"engine-{part}.png")
            save_png(figure(rows), drawn[-1])
    return drawn


def new_figure(columns: int, title: str, width: float = 5.0, height: float = 4.4, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plain(axes: Any, title: str, x: str = "", y: str = "", grid: str = "y") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def _label(axes: Any, bars: Any, texts: Sequence[str]) -> None:
    axes.bar_label(bars, texts, fontsize=8, padding=2)


def decode_figure(rows: Sequence[Row]) -> Any:
    """Ratio to the best peer by batch, and how near this machine's memory bandwidth."""
    figure, ((left, right),) = new_figure(2, "Greedy decoding, same weights, same run", 6.0)
    names = [f"{row['preset']}\n{row['dtype']}" for row in rows]
    batches = [each["batch"] for each in rows[0]["batches"]]
    width = 0.8 / len(batches)
    for offset, (batch, colour) in enumerate(zip(batches, (BLUE, ORANGE, GREEN), strict=False)):
        of_batch = [next(each for each in row["batches"] if each["batch"] == batch) for row in rows]
        places = [number + (offset - (len(batches) - 1) / 2) * width for number in range(len(rows))]
        ratios = [each["ratio"] for each in of_batch]
        spread = [
            [each["ratio"] - min([*each["ratio_of_rounds"], each["ratio"]]) for each in of_batch],
            [max([*each["ratio_of_rounds"], each["ratio"]]) - each["ratio"] for each in of_batch],
        ]
        left.bar(places, ratios, width * 0.92, color=colour, label=f"batch {batch}")
        left.errorbar(places, ratios, yerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for place, ratio, above in zip(places, ratios, spread[1], strict=True):
            left.annotate(f"{ratio:.2f}", (place, ratio + above), (0, 3), textcoords="offset points", ha="center")
        shares = [each["share_of_bandwidth"] for each in of_batch]
        _label(right, right.bar(places, shares, width * 0.92, color=colour), [f"{share:.0%}" for share in shares])
    left.axhline(1, color=GREY, linewidth=1, linestyle="--")
    left.margins(y=0.15)
    right.set_ylim(0, max(1.0, right.get_ylim()[1]))
    right.yaxis.set_major_formatter("{x:.0%}")
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), names)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(batches), fontsize=9)
    plain(left, "tokens a second, times transformers' fastest (bars: rounds)", y="ratio")
    plain(right, "of the memory bandwidth: weights touched and cache", y="share")
    return figure


def serving_figure(rows: Sequence[Row]) -> Any:
    """For each preset and dtype: time to first token and throughput by load."""
    by_model: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        loads = [(f"{row['load'].capitalize()}: {load}", servers) for load, servers in row["loads"].items()]
        by_model.setdefault(f"{row['preset']} {row['dtype']}", []).extend(loads)
    figure, grid = new_figure(2, "Service under load", 6.2, 3.6, rows=len(by_model))
    for (left, right), (name, loads) in zip(grid, by_model.items(), strict=True):
        for place, (_, servers) in enumerate(loads):
            _one_load(left, right, place, servers)
        left.set_xscale("log")
        left.xaxis.set_major_formatter("{x:g}")
        left.set_yticks(range(len(loads)), [load for load, _ in loads], fontsize=9)
        right.set_yticks(range(len(loads)), [""] * len(loads))
        right.margins(x=0.12)
        for axes in (left, right):
            axes.set_ylim(len(loads) - 0.5, -0.5)
        plain(left, f"{name}: time to first token (● p50, ◆ p90, | p99)", "seconds, logarithmic", grid="x")
        plain(right, "throughput", "output tokens a second", grid="x")
    _legend_of_servers(figure, rows)
    return figure


def _one_load(left: Any, right: Any, place: float, servers: dict[str, Row]) -> None:
    """Left a line from the median to the 99th percentile with a mark at each and at the 90th, right a bar."""
    offsets = (0.0,) if len(servers) == 1 else (-0.19, 0.19)
    for (server, found), offset in zip(servers.items(), offsets, strict=True):
        times, colour, at = found["first_token_seconds"], _colour(server), place + offset
        left.plot([times["p50"], times["p99"]], [at, at], color=colour, linewidth=1.6)
        for share, marker, size in (("p50", "o", 5), ("p90", "D", 5), ("p99", "|", 9)):
            left.plot(times[share], at, marker, color=colour, markersize=size)
        rate = found["output_tokens_per_second"]
        _label(right, right.barh([at], [rate], 0.36, color=colour), [f"{rate:,.0f}"])


def _legend_of_servers(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.patches import Patch

    servers = {server for row in rows for load in row["loads"].values() for server in load}
    names = {"abyssal": "abyssal"} | {server: "transformers, static batches" for server in servers - {"abyssal"}}
    patches = {label: Patch(color=_colour(server), label=label) for server, label in sorted(names.items())}
    figure.legend(handles=list(patches.values()), loc="outside lower center", ncols=2, fontsize=9)


def _colour(server: str) -> str:
    return BLUE if server == "abyssal" else ORANGE


def disk_figure(rows: Sequence[Row]) -> Any:
    """First token of a long shared prefix: transformers, cold, disk, its bound, memory."""
    figure, (panels,) = new_figure(len(rows), f"First token after {rows[0]['prefix']:,} tokens seen before", 4.0)
    for axes, row in zip(panels, rows, strict=True):
        medians = {kind: statistics.median(values) * 1e3 for kind, values in row["seconds"].items()}
        theirs = statistics.median(row["transformers_seconds"][row["best_peer"]]) * 1e3
        bars = {
            "transformers,\ncold": (theirs, ORANGE),
            "cold": (medians["cold"], GREY),
            "disk, after\na restart": (medians["disk"], BLUE),
            "bytes ÷ rate\n+ one step": (row["bound_seconds"] * 1e3, LIGHT),
            "memory": (medians["memory"], GREEN),
        }
        values = [value for value, _ in bars.values()]
        drawn = axes.bar(range(len(bars)), values, 0.7, color=[colour for _, colour in bars.values()])
        _label(axes, drawn, [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in values])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.margins(y=0.12)
        axes.set_xticks(range(len(bars)), list(bars), rotation=40, ha="right", fontsize=8)
        title = f"{row['preset']} {row['dtype']}: disk {row['sooner_than_cold']:.1f} × sooner"
        plain(axes, title, y="milliseconds, logarithmic")
    return figure


def speculation_figure(rows: Sequence[Row]) -> Any:
    """Gain by the number of drafts, and how many are accepted at each position of the longest row of drafts."""
    figure, ((left, right),) = new_figure(2, "Speculation by a trained MTP module", 5.6)
    series = [(row, each) for row in rows for each in row["batches"]]
    names = list(series[0][1]["gain"])
    most = max(names, key=lambda name: len(series[0][1]["acceptance"][name]))
    width = 0.8 / len(series)
    for offset, ((row, each), colour) in enumerate(zip(series, SERIES, strict=False)):
        shift = (offset - (len(series) - 1) / 2) * width
        how = "greedy" if not row["temperature"] else f"temperature {row['temperature']:g}"
        label = f"{row['dtype']}, {how}, batch {each['batch']}"
        gains = [each["gain"][name] for name in names]
        left.bar([number + shift for number in range(len(names))], gains, width * 0.92, color=colour, label=label)
        accepted = each["acceptance"][most]
        right.bar([position + 1 + shift for position in range(len(accepted))], accepted, width * 0.92, color=colour)
    left.axhline(1, color=GREY, linewidth=1, linestyle="--")
    left.set_xticks(range(len(names)), names)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter("{x:.0%}")
    right.set_xticks(range(1, 1 + len(series[0][1]["acceptance"][most])))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    plain(left, "tokens a second, times no drafts", "drafts a step", "gain")
    plain(right, f"accepted, it and all before it, of {most} drafts a step", "position of the draft", "share")
    return figure
