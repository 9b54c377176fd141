"""What serving costs the engine: tokens a second through the server, beside the offline API at the same batch.

Both engines are processes of their own with the same settings, and take turns; the same prompts come at once, and each
gets the same greedy answer.  Three rates are told of each:

- in steps: tokens over the seconds spent in the engine's steps, by the server's metrics or the offline engine's clock;
- on the processor: tokens over the seconds that the engine's process computed, with all that it does to tell of them.
  What else the machine does hardly weighs on it, but threads that wait for each other count as computing;
- of the whole: tokens from the first request sent to the last token read.

With ``threads`` 1 the engine computes on one core and leaves the other to HTTP and the clients, who are somebody else's
machine in earnest; with 2 all of them share two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine_parts.load import Job
from engine_parts.setting import Case, Part, Setting, random_prompts

from abyssal.spec.presets import preset

from .clients import closed_load
from .load import serve_options
from .models import servable_model
from .process import ServerProcess

PROMPT, NEW = 128, 256
BATCHES = (1, 8, 32)
KINDS = {"engine": "in steps", "processor": "on the processor", "whole": "whole"}
Rates = dict[str, float]
"""By :data:`KINDS`, in tokens a second."""


def cases(setting: Setting) -> list[Case]:
    return [{**case, "threads": threads} for case in setting.cases() for threads in setting.threads]


class Offline:
    """A process that answers batches through ``abyssal.LLM``."""

    def __init__(self, folder: Path, dtype: str, most: int, threads: int) -> None:
        folders = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        request = json.dumps({"folder": str(folder), "dtype": dtype, "max_sequences": most})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server_parts.offline_process", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": str(threads)},
        )

    def __call__(self, jobs: list[Job]) -> Rates:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([[job.prompt, job.new_tokens] for job in jobs]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the offline engine ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def served(server: ServerProcess, jobs: list[Job]) -> Rates:
    """The same through the server, each request by a client of its own."""
    before, used_before, start = server.counted(), server.cpu_seconds(), time.perf_counter()
    measured = closed_load(server.port, jobs, len(jobs))
    seconds, tokens = time.perf_counter() - start, sum(each.served.tokens for each in measured)
    used = server.cpu_seconds()
    time.sleep(1.5)  # the engine tells of its steps once in a while
    after = server.counted()
    assert after.output_tokens - before.output_tokens == tokens, "somebody else asked meanwhile"
    return {
        "engine": tokens / (after.step_seconds - before.step_seconds),
        "processor": tokens / (used - used_before),
        "whole": tokens / seconds,
    }


def lengths(setting: Setting) -> tuple[int, int]:
    """:data:`PROMPT` and :data:`NEW`."""
    return (16, 12) if setting.smoke else (PROMPT, NEW)


def batch_jobs(batch: int, setting: Setting, vocab_size: int, seed: int) -> list[Job]:
    prompt, new = lengths(setting)
    rows = random_prompts(batch, prompt, vocab_size, seed).tolist()
    return [Job(number, 0.0, tuple(row), new) for number, row in enumerate(rows)]


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """All batches of one preset in one dtype with so many threads."""
    folder, vocab_size = servable_model(case["preset"], setting.scratch), preset(case["preset"]).vocab_size
    batches = (1, 2) if setting.smoke else BATCHES
    options, most = serve_options(case["dtype"], setting), max(64, *setting.batches)
    offline = Offline(folder, case["dtype"], most, case["threads"])
    try:
        with ServerProcess(folder, *options, threads=case["threads"]) as server:
            found = [_batch(batch, setting, vocab_size, server, offline) for batch in batches]
    finally:
        offline.close()
    prompt, new = lengths(setting)
    return {**case, "prompt": prompt, "new": new, "batches": found}


def _batch(batch: int, setting: Setting, vocab_size: int, server: ServerProcess, offline: Offline) -> dict[str, Any]:
    rounds: list[tuple[Rates, Rates]] = []
    for number in range(setting.repeats + 1):
        jobs = batch_jobs(batch, setting, vocab_size, number)  # new ones: nothing of them is cached
        theirs = offline(jobs) if number % 2 else None  # who goes first changes with the round
        ours = served(server, jobs)
        rounds.append((ours, theirs or offline(jobs)))
    del rounds[0]  # it was to warm up
    result: dict[str, Any] = {"batch": batch, "server": [], "offline": []}
    for ours, theirs in rounds:
        result["server"].append(ours)
        result["offline"].append(theirs)
    for kind in KINDS:
        result[f"{kind}_ratio_of_rounds"] = [ours[kind] / theirs[kind] for ours, theirs in rounds]
        result[f"{kind}_ratio"] = statistics.median(result[f"{kind}_ratio_of_rounds"])
    return result


def lines(row: dict[str, Any]) -> list[str]:
    """A table: each rate of both, and their ratio."""
    head = "".join(f"{name:>27}" for name in KINDS.values())
    lengths = f"{row['prompt']} prompt and {row['new']} new tokens"
    text = [
        f"{row['preset']} {row['dtype']}, {row['threads']} threads, {lengths}: server, offline, ratio",
        f"{'batch':>6}{head}",
    ]
    for each in row["batches"]:
        shown = f"{each['batch']:6d}"
        for kind in KINDS:
            ours, theirs = (statistics.median(rates[kind] for rates in each[whose]) for whose in ("server", "offline"))
            shown += f"{ours:11.1f}{theirs:9.1f}{each[f'{kind}_ratio']:7.3f}"
        text.append(shown)
    return text


PART = Part("overhead", "the engine inside the server, beside the offline API", cases, measure, lines)
