"""Folders that transformers writes (with the safetensors library), and what transformers finds in ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.hf import load_model, save_model
from abyssal.spec.hf_config import write_config
from abyssal.spec.model import GroupedQueryAttentionSpec, ModelSpec, MoESpec
from tests.support.checkpoints import SMALL, assert_same_weights, random_model

transformers = pytest.importorskip("transformers")

DENSE = replace(
    SMALL,
    family="llama",
    moe=None,
    num_dense_layers=0,
    mtp_depth=0,
    rope_interleaved=False,
    attention=GroupedQueryAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=34),
)
SOFTMAX = replace(
    SMALL,
    family="deepseek_v2",
    mtp_depth=0,
    moe=MoESpec(
        num_experts=4, num_shared_experts=2, top_k=2, expert_ffn_size=30,
        scoring="softmax", renormalise=False, correction_bias=False,
    ),
)  # fmt: skip
FAMILIES: dict[str, ModelSpec] = {
    "deepseek_v3": replace(SMALL, mtp_depth=0),
    "deepseek_v2": SOFTMAX,
    "llama": DENSE,
    "tied": replace(DENSE, tie_embeddings=True),
}


def _theirs(spec: ModelSpec) -> Any:
    config = transformers.AutoConfig.for_model(**write_config(spec, "float32"))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_goes_through_ours_and_back(family: str, tmp_path: Path) -> None:
    theirs = _theirs(FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", "fp32")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_the_mtp_layer_is_all_that_transformers_does_not_know(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "with", "fp32")
    convert(tmp_path / "with", tmp_path / "without", "fp32", include_mtp=False)
    unexpected = {}
    for name in ("with", "without"):
        _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        unexpected[name] = set(info["unexpected_keys"])
    assert not unexpected["without"]
    assert unexpected["with"] and all(name.startswith("model.layers.2.") for name in unexpected["with"])


def test_a_folder_that_transformers_saved_without_its_mtp_layer(tmp_path: Path) -> None:
    _theirs(SMALL).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning, match="num_nextn_predict_layers"):
        assert load_model(tmp_path / "theirs").spec.mtp_depth == 0
    with pytest.warns(UserWarning, match="num_nextn_predict_layers"):
        convert(tmp_path / "theirs", tmp_path / "ours", "bf16")
    assert load_model(tmp_path / "ours", mtp=None).spec.mtp_depth == 0


def test_bf16_goes_both_ways(tmp_path: Path) -> None:
    spec = replace(SMALL, mtp_depth=0)
    model = random_model(spec, torch.bfloat16)
    save_model(model, tmp_path / "ours")
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    weights.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_model(tmp_path / "theirs"), model)
