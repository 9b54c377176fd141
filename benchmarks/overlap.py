"""How much communication an overlapped pair hides: a step one after the other, overlapped, and without communication.

    python benchmarks/overlap.py [--ratio 1.0] [--gigabits RATE] [--hidden 2048] [--micro-batches 48] [--repeats 2]
        [--links namespaces | limiter] [--results FOLDER | --docs] [--smoke] [--draw]

Two ranks hold a model's experts together, each a process of one thread on a core of its own, its communication's
threads too, and in a network namespace of its own (user space where these are refused; see support/link.py).  Both run
DualPipeV's schedule of one pipeline rank, in which nearly every forward is paired with a backward.  The link between
them is made so slow that communication takes ``--ratio`` of the time of computation; what it takes is measured.

The same executor and schedule run three times in every round: each pair one after the other, overlapped, and with
communication removed: what it brought is kept in a first step and given again.  So losses and gradients are the same,
bit for bit, which is checked.  What is hidden is (serial - overlapped) / (serial - none).

Beside it: where an overlapped step still waits, move by move; what communication takes of the core itself, which
nothing hides; four ranks that sleep under several schedules, beside the simulator; and what the machinery costs on one
rank without a pipeline.  Saved as overlap.json, overlap.png and overlap-trace.json.gz (one overlapped step, for
ui.perfetto.dev).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from overlap_parts import table
from overlap_parts.draw import draw
from overlap_parts.measure import LEAST, MOST, measure
from overlap_parts.overhead import measure_overhead
from overlap_parts.setting import Setting
from overlap_parts.sleeping import measure_sleeping
from overlap_parts.trace import write_trace
from support.link import LinkKind
from support.record import RESULTS, announce, header, save

DOCS = Path(__file__).parents[1] / "docs" / "results"
SMOKE = {"hidden": 64, "rows": 1, "length": 64, "heads": 4, "expert_ffn": 64, "micro_batches": 3}


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    folder = DOCS if chosen.docs else chosen.results
    trace = folder / "overlap-trace.json.gz"
    if not chosen.draw:
        data: dict[str, Any] = header()
        data["command"] = shlex.join(["python", "benchmarks/overlap.py", *(argv or sys.argv[1:])])
        announce(data)
        _machinery(chosen, data)
        found, notes = measure(chosen.setting, chosen.ratio, chosen.links, chosen.repeats, chosen.gigabits)
        print("", *table.overlap(found), sep="\n", flush=True)
        save("overlap", {**data, "overlap": found.as_json()}, folder)
        write_trace(notes, trace)
        print(f"\nsaved {folder / 'overlap.json'} and {trace}")
    draw(json.loads((folder / "overlap.json").read_text()), trace, folder / "overlap.png")
    print(f"saved {folder / 'overlap.png'}")
    return 0


def _machinery(chosen: argparse.Namespace, data: dict[str, Any]) -> None:
    """What needs no link."""
    unit, sleeps, micro_batches = (0.002, 1, 2) if chosen.smoke else (0.02, 3, 2)
    overhead = measure_overhead(chosen.setting, micro_batches, 1 if chosen.smoke else chosen.repeats + 4)
    print("", *table.overhead(overhead), sep="\n", flush=True)
    slept = measure_sleeping(16, unit, sleeps)
    print("", *table.sleeping(slept), sep="\n", flush=True)
    data |= {"overhead": overhead.as_json(), "sleeping": [one.as_json() for one in slept]}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``setting`` is what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ratio", type=float, default=1.0, help="of communication to computation, 0.8 to 1.2")
    parser.add_argument("--gigabits", type=float, help="a second of the link; by default found for --ratio")
    parser.add_argument("--hidden", type=int, default=Setting.hidden, help="channels of a token")
    parser.add_argument("--rows", type=int, default=Setting.rows, help=f"of {Setting.length} tokens, a micro-batch")
    parser.add_argument("--layers", type=int, default=Setting.layers)
    parser.add_argument("--micro-batches", type=int, default=Setting.micro_batches, help="of a rank and step")
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    parser.add_argument("--links", choices=get_args(LinkKind), help="by default namespaces where they are allowed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is saved")
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    parser.add_argument("--smoke", action="store_true", help="a small model and few micro-batches, for tests")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is saved")
    chosen = parser.parse_args(argv)
    if chosen.repeats < 1 or (chosen.gigabits is not None and chosen.gigabits <= 0):
        parser.error("--repeats and --gigabits must be above 0")
    if not LEAST <= chosen.ratio <= MOST:
        parser.error(f"--ratio is {chosen.ratio}; give {LEAST} to {MOST}")
    named = {name: getattr(chosen, name) for name in ("hidden", "rows", "layers", "micro_batches")}
    try:
        chosen.setting = Setting(**(SMOKE if chosen.smoke else named))
    except ValueError as error:
        parser.error(str(error))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
