"""What every benchmark says of itself: the commit, the machine, medians, and a file with the data."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def processor() -> str:
    """The processor's name as the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def header() -> dict[str, Any]:
    """Commit (with a plus sign when the tree has changes), machine, versions, load."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def options(doc: str | None, presets: Iterable[str], default: list[str], dtypes: Iterable[str]) -> argparse.Namespace:
    """The command line that benchmarks beside a peer share: presets, dtypes, repeats."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=default, choices=list(presets))
    parser.add_argument("--dtypes", nargs="+", default=list(dtypes), choices=list(dtypes))
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def announce(about: dict[str, Any]) -> None:
    """Print the header, a line each."""
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each function's results of ``repeats`` rounds, one after another within a round, after one round to warm up: what
    else the machine does then falls on all of them."""
    results: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            result = function()
            if round_number:
                results[name].append(result)
    return results


def ratio_to_best(ours: list[float], theirs: dict[str, list[float]]) -> tuple[str, float]:
    """Our median over the best median of theirs, and whose that is."""
    best = max(theirs, key=lambda name: statistics.median(theirs[name]))
    return best, statistics.median(ours) / statistics.median(theirs[best])


def save(name: str, data: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``name``.json; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
