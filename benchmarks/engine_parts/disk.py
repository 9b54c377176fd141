"""A prefix of 2,048 tokens after a restart: seconds to the first token cold, from memory and from disk.

Each round is two lives of an engine in processes of their own, on a cache folder of their own, and one of transformers'
prefill of as many tokens.  The bound beside the disk hit is what it cannot beat: the pages' bytes at the rate at which
the same files can be read, and one step, which is what a hit in memory takes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.peer import DTYPES, load_ours, write_model

from abyssal.cache.pages import PAGE
from abyssal.spec.arithmetic import kv_cache_bytes_per_token
from abyssal.text.tokenizer import train_bpe

from .peers import load_peers, prefill_seconds
from .setting import Case, Part, Setting, random_prompts

PREFIX, TAIL = 2048, 16
KINDS = ("cold", "memory", "disk")


def with_tokenizer(folder: Path) -> Path:
    """The model folder with a small tokenizer, which a server's folder has."""
    if not (folder / "tokenizer.json").exists():
        train_bpe([Path(__file__).read_text(encoding="utf-8")], 512).save(folder)
    return folder


def one_life(request: dict[str, Any]) -> dict[str, Any]:
    """Run ``disk_process`` to its end.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    benchmarks = str(Path(__file__).parents[1])
    path = os.pathsep.join([benchmarks, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "engine_parts.disk_process", json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"{request['action']}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bound_seconds(num_bytes: float, bytes_per_second: float, step_seconds: float) -> float:
    """What a hit on disk takes at least: reading, and the step after it."""
    return num_bytes / bytes_per_second + step_seconds


def _round(request: dict[str, Any], seed: int) -> dict[str, Any]:
    """Two lives."""
    request = {**request, "seed": seed}
    found = {**one_life({**request, "action": "write"}), **one_life({**request, "action": "read"})}
    shutil.rmtree(request["cache"])
    expected = request["prefix"] // PAGE * PAGE
    for kind in ("memory", "disk"):
        assert found[kind]["cached_tokens"] == expected, (kind, found[kind], expected)
    assert found["memory"]["token"] == found["disk"]["token"], "memory and disk disagree"
    return found


def _kept(values: Sequence[bool | None]) -> str:
    """Whether the system's cache still held the files when they were read."""
    if any(value is None for value in values):
        return "the system does not say"
    return "yes" if any(values) else "no"


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Rounds of two lives and transformers' prefill."""
    folder = with_tokenizer(write_model(case["preset"], setting.scratch))
    prefix = 256 if setting.smoke else PREFIX
    request = {"folder": str(folder), "dtype": case["dtype"], "prefix": prefix, "tail": TAIL}
    request["cache"] = str(setting.scratch / "pages")
    shutil.rmtree(request["cache"], ignore_errors=True)
    spec = load_ours(folder, case["dtype"]).spec
    peers = load_peers(folder, case["dtype"])
    tokens_1S = random_prompts(1, prefix + TAIL, spec.vocab_size)
    rounds: list[dict[str, Any]] = []
    theirs: dict[str, list[float]] = {form: [] for form in peers}
    for number in range(setting.repeats + 1):
        found = _round(request, 10 * number)
        seconds = {form: prefill_seconds(model, tokens_1S) for form, model in peers.items()}
        if number:
            rounds.append(found)
            for form, value in seconds.items():
                theirs[form].append(value)
    return {**case, "prefix": prefix, "tail": TAIL, **_row(rounds, theirs, _page_bytes(spec, case, prefix))}


def _page_bytes(spec: Any, case: Case, prefix: int) -> int:
    """Of the prefix's pages, as the engine keeps them."""
    return kv_cache_bytes_per_token(spec, bytes_per_value=DTYPES[case["dtype"]].itemsize) * (prefix // PAGE * PAGE)


def _row(rounds: list[dict[str, Any]], theirs: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    times = {kind: [found[kind]["seconds"] for found in rounds] for kind in KINDS}
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    rate = statistics.median(found["bytes_per_second"] for found in rounds)
    bound = bound_seconds(num_bytes, rate, medians["memory"])
    best = min(theirs, key=lambda form: statistics.median(theirs[form]))
    return {
        "seconds": times,
        "transformers_seconds": theirs,
        "best_peer": best,
        "page_bytes": num_bytes,
        "disk_bytes_per_second": rate,
        "memory_bytes_per_second": statistics.median(found["bytes_per_second_again"] for found in rounds),
        "files_still_in_memory": _kept([value for found in rounds for value in found["files_in_memory"]]),
        "bound_seconds": bound,
        "sooner_than_cold": medians["cold"] / medians["disk"],
        "times_the_bound": medians["disk"] / bound,
        "cold_beside_transformers": statistics.median(theirs[best]) / medians["cold"],
        "load_seconds": statistics.median(found["load_seconds"] for found in rounds),
        "open_seconds": statistics.median(found["open_seconds"] for found in rounds),
    }


def lines(row: dict[str, Any]) -> list[str]:
    """A table: cold, memory, disk, the bound, transformers."""
    medians = {kind: statistics.median(row["seconds"][kind]) * 1e3 for kind in KINDS}
    theirs = statistics.median(row["transformers_seconds"][row["best_peer"]]) * 1e3
    rate, memory = row["disk_bytes_per_second"] / 1e6, row["memory_bytes_per_second"] / 1e6
    size = row["page_bytes"] / 2**20
    beside = f"transformers {row['best_peer']}: {theirs:.1f} ms, {row['cold_beside_transformers']:.2f} x ours"
    still = row["files_still_in_memory"]
    return [
        f"{row['preset']} {row['dtype']}, {row['prefix']} tokens shared, {row['tail']} of its own; first token after",
        f"  cold                      {medians['cold']:9.1f} ms   ({beside})",
        f"  hit in memory             {medians['memory']:9.1f} ms",
        f"  hit on disk, new process  {medians['disk']:9.1f} ms   {row['sooner_than_cold']:.1f} x sooner than cold, "
        f"{row['times_the_bound']:.2f} x the bound",
        f"  bound                     {row['bound_seconds'] * 1e3:9.1f} ms   {size:.1f} MiB at {rate:,.0f} MB/s, "
        f"and a hit in memory",
        f"  in the system's memory when read: {still}; read again from there at {memory:,.0f} MB/s",
    ]


PART = Part("disk", "a prefix after a restart", Setting.cases, measure, lines)
