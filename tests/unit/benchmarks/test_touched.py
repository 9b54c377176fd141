"""Bytes and FLOPs that a step needs, and rows of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from abyssal.spec.presets import preset
from benchmarks.engine_parts.results import Results
from benchmarks.engine_parts.touched import decode_bytes, decode_flops, distinct_experts, expert_elements


def test_experts_of_a_step_are_counted_once_a_layer() -> None:
    first = np.array([[[9, 9]], [[0, 1]], [[2, 3]]])  # T = 3, L = 1, K = 2
    second = np.array([[[9, 9]], [[1, 0]], [[3, 4]]])
    assert distinct_experts([first, second], first=1) == (2 + 3) / 2
    two_layers = np.stack([first[:, 0], second[:, 0]], axis=1)
    assert distinct_experts([two_layers], first=2) == 4


def test_no_step_has_no_experts() -> None:
    with pytest.raises(ValueError, match="first"):
        distinct_experts([np.zeros((2, 1, 2), int)], first=2)


def test_a_single_token_reads_the_active_weights_and_its_cache() -> None:
    spec = preset("tiny")
    chosen = 3 * 4  # layers with experts, experts chosen
    cache = 4 * 48 * 100 * 2  # layers, values, positions, bytes
    assert decode_bytes(spec, chosen, 1, 100, 2) == 2 * spec.active_parameters_without_embedding + cache
    more = decode_bytes(spec, chosen + 5, 8, 100, 2) - decode_bytes(spec, chosen, 1, 100, 2)
    assert more == 5 * expert_elements(spec) * 2 + 7 * cache
    assert expert_elements(spec) == 3 * 128 * 128


def test_flops_grow_with_the_batch() -> None:
    spec = preset("tiny")
    assert decode_flops(spec, 8, 100) == 8 * decode_flops(spec, 1, 100) > 16 * spec.active_parameters_without_embedding


def test_a_row_takes_the_place_of_the_one_of_its_case(tmp_path: Path) -> None:
    results = Results(tmp_path / "new")
    case = {"preset": "tiny", "dtype": "fp32"}
    results.add("decode", case, {**case, "commit": "aaa", "value": 1})
    results.add("decode", {**case, "dtype": "bf16"}, {**case, "dtype": "bf16", "commit": "aaa", "value": 2})
    results.add("decode", case, {**case, "commit": "bbb", "value": 3})
    assert [row["value"] for row in results.rows("decode")] == [2, 3]
    assert results.has("decode", case, "bbb") and not results.has("decode", case, "aaa")
    assert not results.has("prefill", case, "bbb")


def test_a_row_of_a_changed_tree_is_never_there(tmp_path: Path) -> None:
    results, case = Results(tmp_path), {"preset": "tiny"}
    results.add("decode", case, {**case, "commit": "aaa+"})
    assert not results.has("decode", case, "aaa+")
