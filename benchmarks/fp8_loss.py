"""Does training in FP8 reach the loss of BF16 [V3 section 3.3]?  Paired runs on the same rows from the same weights.

    python benchmarks/fp8_loss.py bf16 fp8 [--seeds 3] [--threads 1] [--lr 2.5e-4] [--out FOLDER] [--smoke] [--report]

Every run is a folder under OUT/runs with a checkpoint every hundred steps: the same command goes on where a killed one
stopped, and skips what is finished.  Arms are trained seed by seed, so that what is there can be compared at any time:
``--report`` prints, draws and saves what is finished and trains nothing.  Without an arm, the arms that there are.
``--smoke`` runs a handful of steps, whose figures mean nothing.

OUT/fp8-loss.json has the mean relative difference of the last 200 steps of each seed, the spread between seeds of BF16
beside it, curves, the time of a step, and the commit; OUT/fp8-loss.png draws them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp8_training.arms import ARMS, BASE, DEFAULT, FULL, SMOKE

from abyssal.cli.allocator import keep_freed_memory

if TYPE_CHECKING:
    from fp8_training.suite import Suite

MOST_SEEDS = 11


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Goes on where it stopped when given again."
    )
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}; bf16 is what all are held to")
    parser.add_argument("--seeds", type=int, default=None, help="runs of each arm (3; with --smoke 2)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (the machine's)")
    parser.add_argument("--lr", type=float, default=None, help=f"peak learning rate ({FULL.learning_rate:g})")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs (runs/fp8-loss)")
    parser.add_argument("--results", type=Path, default=None, help="folder of the JSON and PNG files (OUT)")
    parser.add_argument("--data", type=Path, nargs="+", help="text to train on (the standard library's source)")
    parser.add_argument("--smoke", action="store_true", help="a handful of steps: does everything run?")
    parser.add_argument("--report", action="store_true", help="train nothing: print, draw, save what is finished")
    chosen = parser.parse_args(argv)
    for name in chosen.arms:
        if name not in ARMS:
            parser.error(f"no arm is named {name!r}; choose among {', '.join(ARMS)}")
    if chosen.seeds is None:
        chosen.seeds = 2 if chosen.smoke else 3
    if not 1 <= chosen.seeds <= MOST_SEEDS:
        parser.error(f"--seeds is {chosen.seeds}; give 1 to {MOST_SEEDS}")
    if chosen.lr is not None and not chosen.lr > 0:
        parser.error(f"--lr is {chosen.lr}; give a positive number")
    if chosen.threads is not None and chosen.threads < 1:
        parser.error(f"--threads is {chosen.threads}; give at least 1")
    if not chosen.arms and chosen.smoke:
        chosen.arms = list(DEFAULT)
    if chosen.out is None:
        chosen.out = Path("runs/fp8-loss-smoke" if chosen.smoke else "runs/fp8-loss")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = options(argv)
    if not chosen.arms and not chosen.report:
        print(*(f"{name:<20} {arm.label}" for name, arm in ARMS.items()), sep="\n")
        return 0
    import torch

    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    from ablation.text import prepared
    from fp8_training.suite import Suite

    scale = SMOKE if chosen.smoke else FULL
    if chosen.lr is not None:
        scale = replace(scale, learning_rate=chosen.lr)
    try:
        suite = Suite(chosen.out, scale, prepared(chosen.out / "data", chosen.data, scale.vocab_size, chosen.smoke))
        if not chosen.report:
            _train(suite, chosen.arms, chosen.seeds)
        _report(suite, chosen)
    except (ValueError, FileNotFoundError) as error:
        print(f"fp8_loss: {error}", file=sys.stderr)
        return 2
    return 0


def _train(suite: Suite, arms: Sequence[str], seeds: int) -> None:
    """Seed by seed, so that what is there is paired when the suite is stopped."""
    for seed in range(seeds):
        for name in arms:
            done = suite.train(ARMS[name], seed)
            print(f"{name}, seed {seed}: {'trained' if done else 'was there'}", flush=True)


def _report(suite: Suite, chosen: argparse.Namespace) -> None:
    """Print, draw and save what is finished of every arm, those not named too."""
    from fp8_training.draw import draw
    from fp8_training.findings import described, findings
    from support.record import header, save

    finished = {name: suite.results(arm, range(MOST_SEEDS)) for name, arm in ARMS.items()}
    base = finished[BASE.name].keys()
    results = {name: runs for name, runs in finished.items() if runs.keys() & base}
    if len(results) < 2:
        print("nothing to compare yet: no seed is finished both in bf16 and in another arm")
        return
    found = findings(results, suite.scale)
    print(*described(found), sep="\n")
    folder = chosen.out if chosen.results is None else chosen.results
    about = {"report": header(), "scale": asdict(suite.scale), "data": suite.data.fingerprint}
    path = save("fp8-loss", {**about, **found}, folder)
    draw(path.with_suffix(".png"), found)
    print(f"saved {path} and {path.with_suffix('.png')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
