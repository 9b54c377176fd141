"""``benchmarks/ablations.py --smoke``: every part runs, intervals are there, and a second call trains nothing again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("balance", "update-rate", "fine-grained", "mtp")


def ablations(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "ablations.py", *arguments, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a smoke run of everything, and what it printed."""
    out = tmp_path_factory.mktemp("ablations")
    done = ablations(out, *NAMES, "--smoke")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_ablation_leaves_its_data_and_its_picture(smoke: tuple[Path, str], name: str) -> None:
    out, _ = smoke
    found = json.loads((out / f"ablation-{name}.json").read_text())
    assert (out / f"ablation-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(found["arms"]) >= 2 and found["report"]["commit"]
    for arm in found["arms"].values():
        assert list(arm["runs"]) == ["0", "1"]
        assert arm["loss"]["seeds"] == 2 and 0 < arm["loss"]["half_width"] < math.inf
        assert arm["commits"]


def test_differences_are_of_the_same_seeds(smoke: tuple[Path, str]) -> None:
    out, printed = smoke
    found = json.loads((out / "ablation-balance.json").read_text())
    first = next(each for each in found["comparisons"] if each["metric"] == "loss" and each["against"] == "none")
    ours, theirs = (found["arms"][first[key]]["runs"] for key in ("arm", "against"))
    differences = [ours[seed]["loss"] - theirs[seed]["loss"] for seed in ours]
    mean = sum(differences) / 2
    # Two values: t = 12.706 at one degree of freedom, standard error |a - b| / 2.
    assert first["difference"]["mean"] == pytest.approx(mean, abs=1e-12)
    half_width = 12.706 * abs(differences[0] - differences[1]) / 2
    assert first["difference"]["half_width"] == pytest.approx(half_width, rel=1e-9)
    assert first["resolved"] == (abs(mean) > half_width)
    unresolved = [each for each in found["comparisons"] if not each["resolved"]]
    assert not unresolved or "no difference resolved at this scale" in printed


def test_arms_of_a_seed_start_alike(smoke: tuple[Path, str]) -> None:
    """The validation before the first step tells weights and text: the same with any balancing and any MTP depth."""
    out, _ = smoke

    def first_losses(seed: int) -> set[float]:
        names = ("loss-free", "auxiliary", "none", "mtp-1", "mtp-3")
        files = [out / "runs" / name / f"seed-{seed}" / "metrics.jsonl" for name in names]
        return {json.loads(file.read_text().splitlines()[0])["loss"] for file in files}

    assert len(first_losses(0)) == len(first_losses(1)) == 1
    assert first_losses(0) != first_losses(1)


def test_a_second_call_skips_what_is_finished_and_does_the_rest(smoke: tuple[Path, str]) -> None:
    out, _ = smoke
    unfinished, finished = (out / "runs" / "none" / f"seed-{seed}" / "result.json" for seed in (0, 1))
    before, found = unfinished.read_text(), finished.stat().st_mtime_ns
    unfinished.unlink()
    done = ablations(out, "balance", "--smoke")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was there") == 7 and "none, seed 0: trained" in done.stdout
    assert json.loads(unfinished.read_text())["loss"] == json.loads(before)["loss"]
    assert finished.stat().st_mtime_ns == found


def test_an_unknown_ablation_is_named(tmp_path: Path) -> None:
    done = ablations(tmp_path, "balanse")
    assert done.returncode == 2 and "'balanse'" in done.stderr and "update-rate" in done.stderr
