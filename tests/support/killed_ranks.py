"""Runs on two ranks that lose one on the way, beside one that is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from abyssal.checkpoint.hf import save_model
from abyssal.train.config import TrainConfig
from abyssal.train.loop import build_model
from tests.support.killed_runs import SPEC
from tests.support.run_data import prepare_texts

ROOT = Path(__file__).parents[2]
STEPS = 40
TIMES = ("seconds", "tokens_per_second", "share_of_peak", "ranks")
"""Fields of events that differ from run to run."""

BY_THE_CLOCK = ("resume", "slow_rank")
"""Events that depend on what else the machine does."""


def prepare(folder: Path) -> Path:
    """A model of a few thousand parameters and text for it, so that starts take longest."""
    texts = [f"number {i} of {i % 7} and {i * i} " * 6 for i in range(120)]
    prepared = prepare_texts(folder / "data", texts, SPEC.vocab_size)
    tokenizer = prepared.tokenizer()
    model = build_model(replace(SPEC, vocab_size=tokenizer.vocab_size), TrainConfig(seed=3))
    save_model(model, folder / "model", "fp32", tokenizer)
    return folder


def train_options(prepared: Path, out: Path, timeout: float, mesh: str = "dp=2,ep=2") -> list[str]:
    """Of ``abyssal``: experts, or layers, over both ranks, a checkpoint every other step, an average."""
    shape = f"--seq-len 24 --batch-size 4 --ema-decay 0.9 --bias-speed 0.01 --mesh {mesh}"
    if "pp=" in mesh:
        shape += " --schedule zb1p --micro-batch-size 1"
    plan = f"--steps {STEPS} --save-every 2 --validate-every 15 --validation-batches 1 --rank-timeout {timeout}"
    paths = "--init", str(prepared / "model"), "--data", str(prepared / "data"), "--out", str(out)
    return ["train", *paths, *shape.split(), *plan.split()]


def torchrun(options: list[str], max_restarts: int = 0, *more: str) -> subprocess.Popen[str]:
    """``abyssal`` on two ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(max_restarts), *more, "-m", "abyssal", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank that ``launcher`` started."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except (OSError, ValueError, IndexError):
            continue  # no process, or one that has just ended
        if f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"{launcher} has no rank {rank}")


def wait_for_step(out: Path, step: int, timeout: float = 60.0) -> None:
    """Return once ``step`` is done."""
    deadline = time.monotonic() + timeout
    while sum(event["event"] == "step" for event in events(out)) < step:
        assert time.monotonic() < deadline, f"step {step} was not done within {timeout} s"
        time.sleep(0.005)


def events(out: Path) -> Iterator[dict[str, Any]]:
    """Lines of the run's metrics, less what differs from run to run."""
    path = out / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            fields = json.loads(line)
        except ValueError:
            return  # half written
        yield {name: value for name, value in fields.items() if name not in TIMES}


def assert_same_end(out: Path, other: Path) -> None:
    """Every step's figures, and the models that were saved, bit for bit."""
    ours, theirs = ([one for one in events(run) if one["event"] not in BY_THE_CLOCK] for run in (out, other))
    assert len(ours) > STEPS and ours == theirs
    models = sorted(path.relative_to(out) for path in out.glob("model*/*"))
    assert models == sorted(path.relative_to(other) for path in other.glob("model*/*"))
    assert {path.parts[0] for path in models} == {"model", "model-average"}
    for path in models:
        assert (out / path).read_bytes() == (other / path).read_bytes(), path


SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
