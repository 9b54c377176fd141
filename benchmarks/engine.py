"""The engine beside transformers: decoding, prefill, service under load, the disk cache, speculation.

    python benchmarks/engine.py [decode] [prefill] [traces] [disk] [speculation]      all of them by default
        [--presets tiny small] [--dtypes fp32 bf16] [--repeats 5] [--batches 1 8 32] [--requests 120]
        [--traces FOLDER] [--model FOLDER] [--resume] [--results FOLDER | --docs] [--smoke]

Each part prints a table a preset and dtype and saves it at once: RESULTS/engine-PART.json, a row a case with the
commit, the machine and the load that it was measured under.  A row that is measured again takes the place of the old
one; ``--resume`` measures only what the file lacks of this commit.  Pictures of whatever is saved are drawn at the
end.

Contestants take turns, a round at a time, after one round to warm up; figures are medians.  ``--docs`` saves in
docs/results instead of benchmarks/results.  ``--smoke`` runs everything on tiny sizes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_parts import decode, disk, prefill, serving, speculation
from engine_parts.draw import draw_all
from engine_parts.results import Results
from engine_parts.setting import Case, Part, Setting
from support.peer import DTYPES
from support.record import RESULTS, announce, header

ROOT = Path(__file__).parents[1]
PARTS = {module.PART.name: module.PART for module in (decode, prefill, serving, disk, speculation)}
PRESETS = ("tiny", "small", "medium")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5, help="rounds after one to warm up")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="of decoding")
    parser.add_argument("--requests", type=int, default=120, help="of each load")
    parser.add_argument("--traces", type=Path, help="folder of the traces (shared/traces beside the repository)")
    parser.add_argument("--model", type=Path, default=Path("runs/engine-benchmark"), help="folder of the trained model")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has saved already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and PNG files")
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is saved")
    parser.add_argument("--smoke", action="store_true", help="does everything run? in a folder of its own")
    chosen = parser.parse_args(argv)
    for name in chosen.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; choose among {', '.join(PARTS)}")
    if chosen.repeats < 1 or chosen.requests < 8:
        parser.error("--repeats must be at least 1 and --requests at least 8")
    if chosen.traces is not None and not chosen.traces.is_dir():
        parser.error(f"--traces: {chosen.traces} is no folder")
    return chosen


def traces_folder(named: Path | None) -> Path | None:
    """The folder named, or ``shared/traces`` in or beside the repository."""
    places = [named] if named is not None else [ROOT / "shared" / "traces", ROOT.parent / "shared" / "traces"]
    return next((place for place in places if place.is_dir()), None)


def setting_of(chosen: argparse.Namespace, scratch: Path) -> Setting:
    traces = traces_folder(chosen.traces)
    if chosen.smoke:
        model = chosen.model if chosen.model.exists() else scratch / "trained"
        return Setting(("tiny",), ("fp32",), 1, 8, scratch, model, traces, batches=(1, 2), smoke=True)
    presets, dtypes = tuple(chosen.presets), tuple(chosen.dtypes)
    batches = tuple(chosen.batches)
    return Setting(presets, dtypes, chosen.repeats, chosen.requests, scratch, chosen.model, traces, batches)


def run(part: Part, setting: Setting, results: Results, resume: bool) -> None:
    """Measure and save every case of a part."""
    print(f"\n== {part.title}", flush=True)
    for case in part.cases(setting):
        about = header()
        if resume and results.has(part.name, case, about["commit"]):
            print(f"\n{_named(case)}: was there", flush=True)
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {**about, **part.measure(case, setting)}
        row["load_after"], row["seconds_of_measuring"] = round(os.getloadavg()[0], 2), time.perf_counter() - start
        results.add(part.name, case, row)
        print("", *part.lines(row), sep="\n", flush=True)


def _named(case: Case) -> str:
    return ", ".join(str(value) for value in case.values())


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    folder = ROOT / "docs" / "results" if chosen.docs else chosen.results
    results = Results(folder / "smoke" if chosen.smoke else folder)
    if not chosen.draw:
        announce(header())
        with tempfile.TemporaryDirectory() as scratch:
            setting = setting_of(chosen, Path(scratch))
            for name in chosen.parts or PARTS:
                run(PARTS[name], setting, results, chosen.resume)
    for path in draw_all(results):
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
