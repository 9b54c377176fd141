"""``benchmarks/server.py --smoke``: every part runs, saves its rows and draws them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "server.py"


def server(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["load", "overhead"])
def test_a_part_runs_and_leaves_data_and_a_picture(part: str, tmp_path: Path) -> None:
    done = server(part, "--smoke", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "smoke" / f"server-{part}.json").read_text())["rows"]
    assert rows and all(row["commit"] and row["machine"] for row in rows)
    assert (tmp_path / "smoke" / f"server-{part}.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    done = server("loads", "--results", tmp_path)
    assert done.returncode == 2 and "'loads'" in done.stderr and "overhead" in done.stderr


def test_guidellm_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = server("--guidellm", tmp_path / "nowhere", "--results", tmp_path)
    assert done.returncode == 2 and "nowhere is no program" in done.stderr
