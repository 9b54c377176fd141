"""Impossible models are refused by field, value and fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.spec.model import GroupedQueryAttentionSpec, LatentAttentionSpec, MoESpec, YarnSpec
from abyssal.spec.presets import preset

V3 = preset("deepseek-v3")
LLM = preset("deepseek-llm-7b")
MOE = MoESpec(num_experts=16, num_shared_experts=1, top_k=4, expert_ffn_size=128, num_groups=4, num_kept_groups=2)
MLA = LatentAttentionSpec(8, 64, 32, 16, 16, 16)
YARN = YarnSpec(factor=40.0, original_max_positions=4096)


@pytest.mark.parametrize(
    ("record", "changes", "named"),
    [
        (V3, {"hidden_size": 0}, "spec.hidden_size is 0"),
        (V3, {"num_layers": -1}, "spec.num_layers is -1"),
        (V3, {"vocab_size": 129280.0}, "spec.vocab_size is 129280.0"),
        (V3, {"family": "deepseek_v4"}, "spec.family is 'deepseek_v4'"),
        (V3, {"attention": LLM.attention}, "spec.attention is a GroupedQueryAttentionSpec"),
        (LLM, {"attention": MLA}, "spec.attention is a LatentAttentionSpec"),
        (LLM, {"moe": MOE}, "spec.moe is set"),
        (LLM, {"mtp_depth": 1}, "spec.mtp_depth is 1"),
        (LLM, {"rope_interleaved": True}, "spec.rope_interleaved is True"),
        (V3, {"family": "deepseek_v2", "mtp_depth": 0, "rope_interleaved": False}, "spec.rope_interleaved is False"),
        (V3, {"family": "deepseek_v2"}, "spec.mtp_depth is 1"),
        (V3, {"num_dense_layers": 61}, "spec.num_dense_layers is 61 of 61"),
        (V3, {"moe": None}, "spec.num_dense_layers is 3 without moe"),
        (V3, {"mtp_depth": -1}, "spec.mtp_depth is -1"),
        (V3, {"eos_token_id": (1, 129280)}, "spec.eos_token_id is 129280"),
        (V3, {"bos_token_id": -1}, "spec.bos_token_id is -1"),
        (V3, {"rms_norm_eps": 0.0}, "spec.rms_norm_eps is 0.0"),
        (V3, {"rope_theta": 1.0}, "spec.rope_theta is 1.0"),
        (V3, {"init_std": 2.0}, "spec.init_std is 2.0"),
        (MLA, {"qk_rope_head_dim": 15}, "attention.qk_rope_head_dim is 15"),
        (MLA, {"q_lora_rank": 0}, "attention.q_lora_rank is 0"),
        (LLM.attention, {"num_kv_heads": 5}, "attention.num_kv_heads is 5"),
        (LLM.attention, {"head_dim": 7}, "attention.head_dim is 7"),
        (MOE, {"num_groups": 3}, "moe.num_groups is 3"),
        (MOE, {"num_kept_groups": 5}, "moe.num_kept_groups is 5"),
        (MOE, {"top_k": 9}, "moe.top_k is 9"),
        (MOE, {"num_groups": 16, "num_kept_groups": 16}, "moe.num_groups is 16"),
        (MOE, {"scoring": "tanh"}, "moe.scoring is 'tanh'"),
        (MOE, {"route_scale": float("nan")}, "moe.route_scale is nan"),
        (MOE, {"num_shared_experts": -1}, "moe.num_shared_experts is -1"),
        (YARN, {"factor": 0.5}, "yarn.factor is 0.5"),
        (YARN, {"mscale": 1.0}, "yarn.mscale is 1.0 and yarn.mscale_all_dim is None"),
        (YARN, {"beta_fast": 1.0}, "yarn.beta_fast is 1.0"),
    ],
)
def test_a_contradiction_is_refused_by_name(record, changes, named):
    with pytest.raises(ValueError) as raised:
        replace(record, **changes)
    assert str(raised.value).startswith(named)
    assert "\n" not in str(raised.value)


def test_softmax_groups_may_hold_one_expert():
    assert replace(MOE, scoring="softmax", num_groups=16, num_kept_groups=16).num_groups == 16


def test_which_layers_have_experts():
    assert [V3.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert V3.num_moe_layers == 58
    assert not LLM.is_moe_layer(29) and LLM.num_moe_layers == 0
    for layer in (-1, 62):
        with pytest.raises(IndexError, match=str(layer)):
            V3.is_moe_layer(layer)


def test_widths_of_attention():
    assert (V3.attention.cache_values, V3.attention.score_dims, V3.attention.rope_dim) == (576, 320, 64)
    assert isinstance(V3.attention, LatentAttentionSpec) and V3.attention.absorbed_score_dims == 1088
    grouped = GroupedQueryAttentionSpec(num_heads=64, num_kv_heads=8, head_dim=128)
    assert (grouped.cache_values, grouped.score_dims, grouped.rope_dim) == (2048, 256, 128)
