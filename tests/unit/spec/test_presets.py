"""Presets: names, and the fields that the sizes do not show."""

from __future__ import annotations

from dataclasses import replace

import pytest

import abyssal
from abyssal.spec.lookup import resolve
from abyssal.spec.model import YarnSpec
from abyssal.spec.presets import PRESETS, preset

NAMES = [
    "deepseek-v3",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-llm-7b",
    "deepseek-llm-67b",
    "deepseek-math-7b",
    "tiny",
    "small",
    "medium",
]


def test_the_names():
    assert list(PRESETS) == NAMES


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError) as raised:
        preset("deepseek-v9")
    assert "'deepseek-v9'" in str(raised.value)
    assert all(name in str(raised.value) for name in NAMES)


def test_positions_of_each_family():
    v3, v2, lite, llm = (preset(name) for name in NAMES[:4])
    assert v3.yarn == YarnSpec(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert v2.yarn == lite.yarn == YarnSpec(40.0, 4096, 32.0, 1.0, 0.707, 0.707)
    assert (v3.max_positions, v2.max_positions, lite.max_positions) == (163840,) * 3
    assert (llm.yarn, llm.max_positions, llm.rope_interleaved) == (None, 4096, False)
    assert v3.rope_interleaved and v2.rope_interleaved and lite.rope_interleaved


def test_gates_of_each_family():
    v3, v2, lite = (preset(name).moe for name in NAMES[:3])
    assert v3 is not None and v2 is not None and lite is not None
    assert (v3.scoring, v3.correction_bias, v3.renormalise, v3.route_scale) == ("sigmoid", True, True, 2.5)
    assert (v2.scoring, v2.correction_bias, v2.renormalise, v2.route_scale) == ("softmax", False, False, 16.0)
    assert (lite.scoring, lite.correction_bias, lite.renormalise, lite.route_scale) == ("softmax", False, False, 1.0)
    assert [(moe.num_groups, moe.num_kept_groups, moe.top_k) for moe in (v3, v2, lite)] == [
        (8, 4, 8),
        (8, 3, 6),
        (1, 1, 6),
    ]


def test_math_is_the_7b_model():
    assert preset("deepseek-math-7b") == preset("deepseek-llm-7b")


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
def test_small_models_have_the_architecture_of_v3(name):
    spec = preset(name)
    assert spec.moe is not None
    assert (spec.family, spec.num_dense_layers, spec.mtp_depth) == ("deepseek_v3", 1, 1)
    assert (spec.moe.num_groups, spec.moe.num_kept_groups, spec.moe.num_shared_experts) == (4, 2, 1)
    assert spec.moe.top_k == (8 if name == "medium" else 4)
    assert spec.vocab_size == (16384 if name == "medium" else 8192)


def test_the_public_face():
    spec = abyssal.preset("deepseek-v3")
    assert isinstance(spec, abyssal.ModelSpec)
    assert replace(spec, mtp_depth=0).mtp_parameters == 0
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = abyssal.nothing_like_it


def test_resolve_takes_names_and_refuses_what_is_neither(tmp_path):
    assert resolve("tiny") == preset("tiny")
    with pytest.raises(ValueError, match=r"tinny is neither .* deepseek-v3"):
        resolve("tinny")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        resolve(tmp_path)
