"""``benchmarks/fp8_loss.py --smoke``: arms run, differences are of the same seeds, a second call goes on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.spec.presets import preset
from abyssal.train.config import TrainConfig
from abyssal.train.loop import build_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARMS = ("bf16", "fp8", "bf16-halves")
LAST = 3  # steps of a smoke run that are compared

pytestmark = pytest.mark.slow


def fp8_loss(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "fp8_loss.py", *arguments, "--smoke", "--threads", "1", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a smoke run of three arms, and what it printed."""
    out = tmp_path_factory.mktemp("fp8-loss")
    done = fp8_loss(out, *ARMS)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def results_of(out: Path, arm: str) -> list[dict[str, Any]]:
    return [json.loads((out / "runs" / arm / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]


def test_differences_are_of_the_same_seeds(smoke: tuple[Path, str]) -> None:
    out, printed = smoke
    found = json.loads((out / "fp8-loss.json").read_text())
    assert (out / "fp8-loss.png").read_bytes().startswith(b"\x89PNG")
    base = results_of(out, "bf16")
    assert [each["arm"] for each in found["comparisons"]] == ["fp8", "bf16-halves"]
    for each in found["comparisons"]:
        expected = []
        for run, other in zip(results_of(out, each["arm"]), base, strict=True):
            last = zip(run["losses"][-LAST:], other["losses"][-LAST:], strict=True)
            expected.append(statistics.mean(a / b - 1 for a, b in last))
        assert [pair["signed"] for pair in each["seeds"].values()] == pytest.approx(expected, abs=1e-12)
        assert each["signed"] == pytest.approx(statistics.mean(expected), abs=1e-12)
        assert each["met"] == all(abs(value) <= found["goal"] for value in expected)
        assert any(value != 0 for value in expected), f"{each['arm']} computed what bf16 did"
    losses = [statistics.mean(run["losses"][-LAST:]) for run in base]
    assert found["between_seeds"]["training"]["largest"] == pytest.approx(
        abs(losses[0] - losses[1]) / statistics.mean(losses)
    )
    assert "goal, in every seed" in printed and "two seeds of BF16 differ by" in printed


def test_arms_of_a_seed_read_the_same_rows(smoke: tuple[Path, str]) -> None:
    out, _ = smoke

    def streams(seed: int) -> set[str]:
        records = [json.loads((out / "runs" / arm / f"seed-{seed}" / "run.json").read_text()) for arm in ARMS]
        assert {record["config"]["seed"] for record in records} == {seed}
        return {record["data"]["stream"] for record in records}

    assert len(streams(0)) == len(streams(1)) == 1 and streams(0) != streams(1)


def test_arms_of_a_seed_start_alike(smoke: tuple[Path, str]) -> None:
    """Before the first step, losses of BF16 are those of one model; initial weights do not depend on the precision."""
    out, _ = smoke

    def first_loss(arm: str, seed: int) -> float:
        return json.loads((out / "runs" / arm / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    assert first_loss("bf16", 0) == first_loss("bf16-halves", 0) != first_loss("bf16", 1)
    spec = preset("tiny")
    models = [build_model(spec, TrainConfig(compute="bfloat16", precision=name)) for name in ("compute", "fp8")]
    for (name, tensor), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_a_second_call_skips_what_is_finished_and_resumes_the_rest(smoke: tuple[Path, str]) -> None:
    out, _ = smoke
    unfinished = out / "runs" / "bf16" / "seed-0" / "result.json"
    before = json.loads(unfinished.read_text())
    unfinished.unlink()
    done = fp8_loss(out, "bf16", "fp8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was there") == 3 and "bf16, seed 0: trained" in done.stdout
    assert json.loads(unfinished.read_text())["losses"] == before["losses"]


def test_reporting_trains_nothing(smoke: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = smoke
    done = fp8_loss(out, "--report", "--results", str(tmp_path))
    assert done.returncode == 0 and "trained" not in done.stdout
    assert json.loads((tmp_path / "fp8-loss.json").read_text())["comparisons"]


def test_an_unknown_arm_is_named(tmp_path: Path) -> None:
    done = fp8_loss(tmp_path, "fp9")
    assert done.returncode == 2 and "'fp9'" in done.stderr and "fp8-tensor-core" in done.stderr
