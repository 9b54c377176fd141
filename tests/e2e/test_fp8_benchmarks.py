"""``benchmarks/fp8_operators.py --smoke``: every part measures something, and the paper's reasons already show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a smoke run saved."""
    out = tmp_path_factory.mktemp("operators")
    command = [sys.executable, BENCHMARKS / "fp8_operators.py", "--smoke", "--results", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert (out / "fp8-operators.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "fp8-operators.json").read_text(encoding="utf-8"))


def test_promotion_bounds_the_error_of_long_sums(operators: dict[str, Any]) -> None:
    largest = {
        (record["matrices"], record["length"], record["summation"]): record["largest"]
        for record in operators["accumulation"]
    }
    for kind in ("normal", "uniform"):
        assert largest[kind, 128, "promoted"] == largest[kind, 128, "tensor_core"]
        assert largest[kind, 512, "tensor_core"] > 2 * largest[kind, 512, "promoted"]
        assert largest[kind, 512, "promoted"] > 100 * largest[kind, 512, "float32"]


def test_an_outlier_hurts_its_own_tile_alone(operators: dict[str, Any]) -> None:
    flushed = {(record["format"], record["outlier"]): record["flushed"] for record in operators["underflow"]}
    assert flushed["one scale, E4M3", 10] == 0
    assert flushed["one scale, E4M3", 10000] > 20 * flushed["1x128, E4M3", 10000]


def test_gradients_of_every_product_are_captured_at_every_step(operators: dict[str, Any]) -> None:
    attention = {f"attention.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "out")}
    mixture = {f"ffn.{part}.{name}" for part in ("experts", "shared") for name in ("gate_up", "down")}
    expected = {0: attention | {"ffn.gate_up", "ffn.down"}, 1: attention | mixture, 2: attention | mixture}
    found = {(record["layer"], record["product"], record["step"]) for record in operators["gradients"]}
    steps = operators["scale"]["steps"]
    assert found == {(layer, name, step) for layer, names in expected.items() for name in names for step in steps}
    for record in operators["gradients"]:
        # E4M3 has four significant bits: at worst 2^-4 a value, some 2.7 % of a token, and both operands 3.8 %.
        assert 0.02 < record["weights"]["median"] < record["1x128"]["median"] < 0.06
        assert record["1x128"]["worst"] <= 0.1 and record["1x128"]["together"] <= record["1x128"]["worst"]
        assert record["1x128"]["flushed"] <= record["128x128"]["flushed"]
