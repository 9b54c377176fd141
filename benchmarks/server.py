"""The server over HTTP: requests a second and times to tokens by concurrency, and what serving costs the engine.

    python benchmarks/server.py [load] [overhead]      both by default
        [--presets tiny small] [--dtypes fp32 bf16] [--clients 1 8 32 128] [--requests 128] [--repeats 5]
        [--threads 1 2] [--resume] [--results FOLDER | --docs] [--draw] [--smoke]

``abyssal serve`` runs in a process of its own, its engine in another, and clients stream from it over loopback.  Each
part prints a table a preset and dtype and saves it at once: RESULTS/server-PART.json, a row a case with the commit, the
machine and the load that it was measured under, and a picture.  ``--resume`` measures only what the file lacks of this
commit; ``--docs`` saves in docs/results instead of benchmarks/results; ``--smoke`` runs everything on tiny sizes, whose
figures mean nothing.

guidellm is an outside check of ``load``, in an environment of its own since its dependencies are many:

    python -m venv guidellm-venv && guidellm-venv/bin/pip install guidellm
    python benchmarks/server.py --guidellm guidellm-venv/bin/guidellm
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_parts.setting import Setting

ROOT = Path(__file__).parents[1]
PARTS = ("load", "overhead")
PRESETS = ("tiny", "small", "medium")
DTYPES = ("fp32", "bf16")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 128], help="concurrencies of load")
    parser.add_argument("--requests", type=int, default=128, help="of each concurrency, at least two a client")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of overhead after one to warm up")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the engine, in overhead")
    parser.add_argument("--guidellm", type=Path, help="the program, to be run beside load on the same server")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has saved already")
    parser.add_argument("--results", type=Path, help="folder of the JSON and PNG files (benchmarks/results)")
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is saved")
    parser.add_argument("--smoke", action="store_true", help="does everything run? in a folder of its own")
    chosen = parser.parse_args(argv)
    for name in chosen.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; choose among {', '.join(PARTS)}")
    if min(chosen.repeats, *chosen.clients, *chosen.threads) < 1 or chosen.requests < 8:
        parser.error("--repeats, --clients and --threads must be at least 1, --requests at least 8")
    if chosen.guidellm is not None and not chosen.guidellm.is_file():
        parser.error(f"--guidellm: {chosen.guidellm} is no program")
    if chosen.docs and chosen.results is not None:
        parser.error("--docs and --results name two folders; give one")
    return chosen


def results_folder(chosen: argparse.Namespace) -> Path:
    """Where files are saved."""
    folder = ROOT / "docs" / "results" if chosen.docs else chosen.results or ROOT / "benchmarks" / "results"
    return folder / "smoke" if chosen.smoke else folder


def setting_of(chosen: argparse.Namespace, scratch: Path) -> Setting:
    from engine_parts.setting import Setting

    if chosen.smoke:
        return Setting(("tiny",), ("fp32",), 1, 8, scratch, scratch, None, batches=(1, 4), smoke=True)
    presets, dtypes = tuple(chosen.presets), tuple(chosen.dtypes)
    clients, threads = tuple(chosen.clients), tuple(chosen.threads)
    return Setting(presets, dtypes, chosen.repeats, chosen.requests, scratch, scratch, None, clients, threads)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    from engine_parts.results import Results
    from server_parts.draw import draw_all

    results = Results(results_folder(chosen), "server")
    if not chosen.draw:
        from engine_parts.run import run_cases
        from server_parts import guidellm, load, overhead
        from support.record import announce, header

        announce(header())
        parts = {part.name: part for part in (load.PART, overhead.PART)}
        with tempfile.TemporaryDirectory() as scratch:
            setting = setting_of(chosen, Path(scratch))
            for name in chosen.parts or ([] if chosen.guidellm else PARTS):
                run_cases(parts[name], setting, results, chosen.resume)
            if chosen.guidellm is not None:
                run_cases(guidellm.part(chosen.guidellm.absolute()), setting, results, chosen.resume)
    for path in draw_all(results):
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
