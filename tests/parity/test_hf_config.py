"""The config.json written here means to transformers what it means here."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from abyssal.spec.hf_config import parse_config, write_config
from abyssal.spec.model import LatentAttentionSpec, ModelSpec
from abyssal.spec.presets import PRESETS, preset
from tests.support.specs import specs

CLASSES: dict[str, Any] = {"deepseek_v3": DeepseekV3Config, "deepseek_v2": DeepseekV2Config, "llama": LlamaConfig}


def _load(spec: ModelSpec, **options: Any) -> Any:
    return CLASSES[spec.family].from_dict(json.loads(json.dumps(write_config(spec, **options))))


def _assert_same(spec: ModelSpec, config: Any) -> None:
    attention, moe = spec.attention, spec.moe
    assert (config.vocab_size, config.hidden_size) == (spec.vocab_size, spec.hidden_size)
    assert (config.num_hidden_layers, config.intermediate_size) == (spec.num_layers, spec.dense_ffn_size)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (spec.rms_norm_eps, spec.tie_embeddings)
    assert config.max_position_embeddings == spec.max_positions and config.initializer_range == spec.init_std
    assert (config.num_attention_heads, config.head_dim) == (attention.num_heads, attention.rope_dim)
    assert (config.hidden_act, config.attention_bias) == ("silu", False)
    eos = list(spec.eos_token_id) if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        spec.bos_token_id,
        eos,
        spec.pad_token_id,
    )
    _assert_same_positions(spec, config)
    if not isinstance(attention, LatentAttentionSpec):
        assert config.num_key_value_heads == attention.num_kv_heads and not config.mlp_bias
        return
    assert (config.q_lora_rank, config.kv_lora_rank) == (attention.q_lora_rank, attention.kv_lora_rank)
    assert (config.qk_nope_head_dim, config.v_head_dim) == (attention.qk_nope_head_dim, attention.v_head_dim)
    depth = spec.mtp_depth if spec.family == "deepseek_v3" else 0
    for layer in range(spec.num_layers + depth):  # a decoder layer of either class asks this
        assert (layer >= config.first_k_dense_replace) == spec.is_moe_layer(layer)
    if spec.family == "deepseek_v3":
        assert (config.num_mtp_layers, config.rope_interleave) == (depth, spec.rope_interleaved)
    if moe is not None:
        assert (config.n_routed_experts, config.n_shared_experts) == (moe.num_experts, moe.num_shared_experts)
        assert (config.num_experts_per_tok, config.moe_intermediate_size) == (moe.top_k, moe.expert_ffn_size)
        assert (config.n_group, config.topk_group) == (moe.num_groups, moe.num_kept_groups)
        assert config.routed_scaling_factor == moe.route_scale and config.norm_topk_prob == moe.renormalise
    if moe is not None and spec.family == "deepseek_v2":
        assert config.topk_method == ("greedy" if moe.num_groups == 1 else "group_limited_greedy")


def _assert_same_positions(spec: ModelSpec, config: Any) -> None:
    rope, yarn = config.rope_parameters, spec.yarn
    assert rope["rope_theta"] == spec.rope_theta
    assert rope["rope_type"] == ("default" if yarn is None else "yarn")
    if yarn is not None:
        assert (rope["factor"], rope["original_max_position_embeddings"]) == (yarn.factor, yarn.original_max_positions)
        assert (rope["beta_fast"], rope["beta_slow"]) == (yarn.beta_fast, yarn.beta_slow)
        assert (rope.get("mscale"), rope.get("mscale_all_dim")) == (yarn.mscale, yarn.mscale_all_dim)


@settings(deadline=None, max_examples=60)
@given(specs())
def test_transformers_reads_the_same_model(spec):
    _assert_same(spec, _load(spec))


@settings(deadline=None, max_examples=60)
@given(specs())
def test_a_file_rewritten_by_transformers_is_the_same_model(spec):
    rewritten = json.loads(_load(spec).to_json_string(use_diff=False))
    assert "rope_parameters" in rewritten
    assert parse_config(rewritten) == spec


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_without_a_complaint(name, caplog):
    logging.getLogger("transformers").propagate = True
    spec = preset(name)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        config = _load(spec)
    assert not caplog.records
    _assert_same(spec, config)
    if spec.yarn is not None:
        _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        assert scale == 1.0


def test_without_mtp_transformers_expects_no_mtp():
    assert _load(preset("tiny"), include_mtp=False).num_mtp_layers == 0


def test_the_quantisation_is_transformers_own():
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(**_load(preset("tiny"), quantization="fp8").quantization_config)
    assert (config.quant_method, list(config.weight_block_size)) == ("fp8", [128, 128])
