"""The engine beside transformers: decoding, prefill, service under load, the disk cache, speculation.

    python benchmarks/engine.py [decode] [prefill] [traces] [disk] [speculation]      all of them by default
        [--presets tiny small] [--dtypes fp32 bf16] [--repeats 5] [--batches 1 8 32] [--requests 120]
        [--traces FOLDER] [--model FOLDER] [--resume] [--results FOLDER | --docs] [--smoke]

Each part prints a table a preset and dtype and saves it at once: RESULTS/engine-PART.json, a row a case with the
commit, the machine and the load that it was measured under.  A row that is measured again takes the place of the old
one; ``--resume`` measures only what the file lacks of this commit.  Pictures of whatever is saved are drawn at the
end.

Contestants take turns, a round at a time, after one round to warm up; figures are medians.  ``--docs`` saves in
docs/results instead of benchmarks/results.  ``--smoke`` runs everything on tiny sizes, whose figures mean nothing.  The
trained model is made once, in some minutes.  Two cores that do nothing else are what the figures need.
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
PARTS = ("decode", "prefill", "traces", "disk", "speculation")
PRESETS = ("tiny", "small", "medium")
DTYPES = ("fp32", "bf16")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5, help="rounds after one to warm up")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="of decoding")
    parser.add_argument("--requests", type=int, default=120, help="of each load")
    parser.add_argument("--traces", type=Path, help="folder of the traces (shared/traces beside the repository)")
    parser.add_argument("--model", type=Path, default=Path("runs/engine-benchmark"), help="folder of the trained model")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has saved already")
    parser.add_argument("--results", type=Path, help="folder of the JSON and PNG files (benchmarks/results)")
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is saved")
    parser.add_argument("--smoke", action="store_true", help="does everything run? in a folder of its own")
    chosen = parser.parse_args(argv)
    for name in chosen.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; choose among {', '.join(PARTS)}")
    if min(chosen.repeats, *chosen.batches) < 1 or chosen.requests < 8:
        parser.error("--repeats and --batches must be at least 1, --requests at least 8")
    if chosen.traces is not None and not chosen.traces.is_dir():
        parser.error(f"--traces: {chosen.traces} is no folder")
    if chosen.docs and chosen.results is not None:
        parser.error("--docs and --results name two folders; give one")
    return chosen


def results_folder(chosen: argparse.Namespace) -> Path:
    """Where files are saved."""
    folder = ROOT / "docs" / "results" if chosen.docs else chosen.results or ROOT / "benchmarks" / "results"
    return folder / "smoke" if chosen.smoke else folder


def traces_folder(named: Path | None) -> Path | None:
    """The folder named, or ``shared/traces`` in or beside the repository."""
    places = [named] if named is not None else [ROOT / "shared" / "traces", ROOT.parent / "shared" / "traces"]
    return next((place for place in places if place.is_dir()), None)


def setting_of(chosen: argparse.Namespace, scratch: Path) -> Setting:
    from engine_parts.setting import Setting

    traces = traces_folder(chosen.traces)
    if chosen.smoke:
        model = chosen.model if chosen.model.exists() else scratch / "trained"
        return Setting(("tiny",), ("fp32",), 1, 8, scratch, model, traces, batches=(1, 2), smoke=True)
    presets, dtypes, batches = tuple(chosen.presets), tuple(chosen.dtypes), tuple(chosen.batches)
    return Setting(presets, dtypes, chosen.repeats, chosen.requests, scratch, chosen.model, traces, batches)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    from engine_parts.draw import draw_all
    from engine_parts.results import Results

    results = Results(results_folder(chosen))
    if not chosen.draw:
        from engine_parts.run import run_part
        from support.record import announce, header

        announce(header())
        with tempfile.TemporaryDirectory() as scratch:
            for name in chosen.parts or PARTS:
                run_part(name, setting_of(chosen, Path(scratch)), results, chosen.resume)
    for path in draw_all(results):
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
