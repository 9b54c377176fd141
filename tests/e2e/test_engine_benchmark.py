"""``benchmarks/engine.py --smoke``: every part runs, saves its rows and draws them; a second call goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trained_model import TrainedModel

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "engine.py"
PARTS = ("decode", "prefill", "traces", "disk", "speculation")


def engine(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_leaves_data_and_a_picture(part: str, trained_model: TrainedModel, tmp_path: Path) -> None:
    run = trained_model.folder.parent
    done = engine(part, "--smoke", "--results", tmp_path, "--model", run)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "smoke" / f"engine-{part}.json").read_text())["rows"]
    assert rows and all(row["commit"] and row["machine"] for row in rows)
    if part != "prefill":
        assert (tmp_path / "smoke" / f"engine-{part}.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["dtype"] in done.stdout


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    done = engine("decoding", "--results", tmp_path)
    assert done.returncode == 2 and "'decoding'" in done.stderr and "prefill" in done.stderr


def test_a_folder_of_traces_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = engine("traces", "--traces", tmp_path / "nowhere", "--results", tmp_path)
    assert done.returncode == 2 and "nowhere is no folder" in done.stderr
