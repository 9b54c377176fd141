"""One part after the other: measured, saved, printed."""

from __future__ import annotations

import os
import time
from typing import Any

from support.record import header

from . import decode, disk, prefill, serving, speculation
from .results import Results
from .setting import Case, Part, Setting

PARTS = {module.PART.name: module.PART for module in (decode, prefill, serving, disk, speculation)}


def run_part(name: str, setting: Setting, results: Results, resume: bool) -> None:
    """One of :data:`PARTS`, as :func:`run_cases`."""
    run_cases(PARTS[name], setting, results, resume)


def run_cases(part: Part, setting: Setting, results: Results, resume: bool) -> None:
    """Measure, save and print every case of a part; with ``resume`` those that this commit lacks."""
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
