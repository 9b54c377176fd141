"""What placements are measured beside, on examples worked out by hand; and the benchmark on one small case."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.support.greedy_placement import greedy_slots, replicated

ROOT = Path(__file__).parents[3]


def test_the_busiest_expert_gets_each_further_slot():
    assert replicated([Fraction(load) for load in (90, 40, 20)], 5) == [0, 0, 0, 1, 2]


def test_slots_go_to_the_least_loaded_rank_with_room():
    """9 | 8, 7 | then 5 beside 7, 4 beside 8, and 1 where there is room left: beside 9."""
    assert greedy_slots([9, 8, 7, 5, 4, 1], 6, 3) == [0, 5, 1, 4, 2, 3]


def test_greed_may_put_an_expert_on_a_rank_twice():
    assert greedy_slots([40, 30, 10], 4, 2) == [1, 2, 0, 0]


def test_groups_go_to_nodes_first():
    """The groups of 13 and 5 on one node, 9 and 9 on the other."""
    assert greedy_slots([6, 7, 4, 5, 5, 4, 3, 2], 8, 2, num_nodes=2, num_groups=4) == [1, 0, 6, 7, 3, 4, 2, 5]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "benchmarks/placement.py", "--layers", "1", "--repeats", "1", "--results", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "placement.json").read_text())["rows"]
    ours = {(row["cluster"], row["loads"]): row for row in rows if row["way"] == "abyssal"}
    greedy = {(row["cluster"], row["loads"]): row for row in rows if row["way"] == "greedy"}
    assert len(ours) == 15 and {row["wasted"] for row in ours.values()} == {0}
    assert all(ours[case]["balance"] >= greedy[case]["balance"] - 0.001 for case in ours)
