"""``abyssal schedule NAME``: a pipeline schedule drawn, timed and weighed, on paper.  Imports no torch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from abyssal.cli.arguments import OneLineParser
from abyssal.parallel.pipeline.schedule import SCHEDULES, schedule
from abyssal.parallel.pipeline.schedule_figures import ClosedForm, activations, closed_form
from abyssal.parallel.pipeline.simulate import Timeline, Times, simulate

ALL = "all"
MOST_WORKS = 500_000
"""Ranks by micro-batches, above which a typing error is likelier than a wish."""


def main(argv: list[str]) -> int:
    """Print a schedule and its figures, or with ``--json`` one JSON object alone; write what files are asked for."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.name == ALL:
        rows = {name: _summary(options, name) for name in SCHEDULES}
        if options.json:
            _print_json(rows)
        else:
            from abyssal.cli.schedule_view import show_comparison

            show_comparison(options.ranks, options.micro_batches, rows)
        return 0
    timeline, form = _run(options, options.name)
    written = _write_files(options, timeline, form)
    if options.json:
        _print_json(describe(timeline, form))
    else:
        from abyssal.cli.schedule_view import show

        show(timeline, form, written)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="abyssal schedule", description="A pipeline schedule: drawn, timed and weighed, on paper."
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(SCHEDULES)}, or {ALL} to compare them")
    parser.add_argument("--ranks", type=int, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, required=True, metavar="M", help="micro-batches a step")
    times = parser.add_argument_group("times", "how long one chunk takes for one micro-batch, in any unit")
    times.add_argument("--forward", type=float, default=1.0, metavar="F", help="forward (default 1)")
    times.add_argument(
        "--input", type=float, default=1.0, metavar="I", help="backward, the input's gradient (default 1)"
    )
    times.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="backward, the weights' gradients (default 1)"
    )
    times.add_argument("--pair", type=float, metavar="F&B", help="a forward and a backward overlapped (default F+I+W)")
    times.add_argument(
        "--send",
        type=float,
        default=0.0,
        metavar="S",
        help="a message between ranks (default 0; the closed forms know of none)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture that can be enlarged")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("forward", "input", "weight", "pair", "send"):
        time = getattr(options, name)
        if time is not None and not (0 <= time < math.inf):
            raise ValueError(f"--{name} is {time}; give a time of 0 or more")
    if not options.forward + options.input + options.weight:
        raise ValueError("--forward, --input and --weight are all 0; give one of them some time")
    if options.ranks * options.micro_batches > MOST_WORKS:
        raise ValueError(
            f"--ranks {options.ranks} by --micro-batches {options.micro_batches} is more than {MOST_WORKS:,} works of "
            "each kind; give fewer"
        )
    for name in ("png", "svg"):
        path = getattr(options, name)
        if path is not None and path.suffix.lower() != f".{name}":
            raise ValueError(f"--{name} is {path}; give a file that ends in .{name}")
    if options.name == ALL and (options.png or options.svg or options.trace):
        raise ValueError(f"--png, --svg and --trace are of one schedule, not of {ALL}; name one")


def _run(options: argparse.Namespace, name: str, of_model: bool = False) -> tuple[Timeline, ClosedForm]:
    """The schedule on paper, and what the closed forms say; with ``of_model`` the times are those of a P-th of the
    model, so that smaller stages take less."""
    made = schedule(name, options.ranks, options.micro_batches)
    share = made.num_ranks / made.num_stages if of_model else 1.0
    forward, input, weight = (time * share for time in (options.forward, options.input, options.weight))
    pair = None if options.pair is None else options.pair * share
    timeline = simulate(made, Times(forward, input, weight, pair, options.send))
    return timeline, closed_form(made, forward, input, weight, pair)


def _write_files(options: argparse.Namespace, timeline: Timeline, form: ClosedForm) -> list[Path]:
    if options.png or options.svg:
        from abyssal.cli.schedule_view import sentence
        from abyssal.parallel.pipeline.draw_picture import draw

        for path in filter(None, (options.png, options.svg)):
            draw(timeline, path, sentence(timeline, form))
    if options.trace:
        from abyssal.parallel.pipeline.trace import write_trace

        write_trace(timeline, options.trace)
    return [path for path in (options.png, options.svg, options.trace) if path]


def describe(timeline: Timeline, form: ClosedForm) -> dict[str, Any]:
    """Every figure, and every action with its times."""
    made = timeline.schedule
    return {
        "schedule": made.name,
        "ranks": made.num_ranks,
        "micro_batches": made.num_micro_batches,
        "stages": made.num_stages,
        "chunks": made.chunks,
        "makespan": timeline.makespan,
        "bubbles": timeline.bubbles(),
        "bubble_closed_form": form.bubble,
        "bubble_formula": form.formula,
        "activations": activations(made),
        "activations_bound": form.activations,
        "parameters": len(made.chunks[0]),
        "actions": [
            [
                {
                    "works": [
                        {"kind": w.kind, "chunk": w.chunk, "stage": w.stage, "micro_batch": w.micro_batch}
                        for w in span.action.works
                    ],
                    "start": span.start,
                    "end": span.end,
                }
                for span in spans
            ]
            for spans in timeline.spans
        ],
    }


def _summary(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One schedule's figures for the whole model, or why it does not take these numbers."""
    try:
        timeline, form = _run(options, name, of_model=True)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    made = timeline.schedule
    return {
        "makespan": timeline.makespan,
        "bubble": max(timeline.bubbles()),
        "bubble_closed_form": form.bubble,
        "bubble_formula": form.formula,
        "activations": max(activations(made)),
        "activations_bound": form.activations,
        "parameters": len(made.chunks[0]),
        "stages": made.num_stages,
    }


def _print_json(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout, indent=None if "actions" in value else 2)
    sys.stdout.write("\n")
