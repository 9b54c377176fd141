"""Plain and hierarchical dispatch between "nodes" with a slow link: bytes by link, time, and how full the link was.

    python benchmarks/dispatch.py [--layouts 2x2 4x1 2x4] [--gigabits 0.25 1] [--hidden 7168] [--tokens 256]
        [--kept-nodes M] [--repeats 7] [--links namespaces | limiter] [--results FOLDER | --docs] [--draw]

A layout is nodes x ranks a node, a process and thread each.  Nodes are network namespaces whose cables a token bucket
slows down (needs root), or processes that are held back in user space where these are refused; see support/link.py.
What the cables really give is measured first.  Then tokens of random scores, chosen as V3 does (8 experts of 256, on at
most M nodes), are dispatched in FP8 and combined in BF16: plain, hierarchically in chunks of several sizes, and in the
size that the dispatcher finds itself.  All ways take turns in every round; times are medians of the slowest rank.
``cores`` is the processor time of all ranks over the machine's cores, a floor that no link lowers.

Bytes are counted three times: by the dispatcher, from the routing alone, and by the interfaces of the nodes, which
see the headers of TCP and the barriers between phases as well.  Saved as dispatch.json and drawn as dispatch.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from dispatch_parts.draw import draw
from dispatch_parts.measure import measure
from dispatch_parts.setting import Setting
from dispatch_parts.table import described
from support.link import LinkKind
from support.record import RESULTS, announce, header, save

DOCS = Path(__file__).parents[1] / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    folder = DOCS if chosen.docs else chosen.results
    if not chosen.draw:
        about = {**header(), "command": shlex.join(["python", "benchmarks/dispatch.py", *(argv or sys.argv[1:])])}
        announce(about)
        cases = []
        for setting in chosen.settings:
            for gigabits in chosen.gigabits:
                case = measure(setting, gigabits, chosen.links, chosen.repeats)
                print("", *described(case), sep="\n", flush=True)
                cases.append(case.as_json())
                save("dispatch", {**about, "repeats": chosen.repeats, "cases": cases}, folder)
        print(f"saved {folder / 'dispatch.json'}")
    data = json.loads((folder / "dispatch.json").read_text())
    draw(data, folder / "dispatch.png")
    print(f"saved {folder / 'dispatch.png'}")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``settings`` holds one for each layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=["2x2"], help="nodes x ranks a node")
    parser.add_argument("--gigabits", nargs="+", type=float, default=[0.25, 1.0], help="a second of each cable")
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a token")
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--kept-nodes", type=int, help="that a token's experts may be on (half of them, at least 2)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds after one to warm up")
    parser.add_argument("--links", choices=get_args(LinkKind), help="by default namespaces where they are allowed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of dispatch.json and dispatch.png")
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is saved")
    chosen = parser.parse_args(argv)
    if min(chosen.repeats, chosen.hidden, chosen.tokens, *chosen.gigabits) <= 0:
        parser.error("--repeats, --hidden, --tokens and --gigabits must be above 0")
    try:
        chosen.settings = [_setting(layout, chosen) for layout in chosen.layouts]
    except ValueError as error:
        parser.error(str(error))
    return chosen


def _setting(layout: str, chosen: argparse.Namespace) -> Setting:
    nodes, _, ranks = layout.partition("x")
    if not (nodes.isdecimal() and ranks.isdecimal() and int(nodes) > 1 and int(ranks) > 0):
        raise ValueError(f"--layouts: {layout!r} is not like 2x2, two nodes or more and their ranks")
    kept = chosen.kept_nodes or max(2, int(nodes) // 2)
    setting = Setting(int(nodes), int(ranks), kept, chosen.tokens, chosen.hidden, chosen.experts)
    assert setting.moe  # refuses what does not fit
    return setting


if __name__ == "__main__":
    sys.exit(main())
