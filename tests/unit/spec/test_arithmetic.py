"""The published figures, and a plain count over the shapes of the module tree."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given

from abyssal.spec import arithmetic
from abyssal.spec.model import LatentAttentionSpec, ModelSpec
from abyssal.spec.presets import PRESETS, preset
from tests.support.specs import specs


def _block_shapes(spec: ModelSpec, moe_layer: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block of the module, written down apart from the code under test."""
    hidden, attention = spec.hidden_size, spec.attention
    shapes: dict[str, tuple[int, ...]] = {"attention_norm": (hidden,), "ffn_norm": (hidden,)}
    heads = attention.num_heads
    if isinstance(attention, LatentAttentionSpec):
        query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        if attention.q_lora_rank is None:
            shapes["q"] = (query, hidden)
        else:
            shapes["q_a"] = (attention.q_lora_rank, hidden)
            shapes["q_norm"] = (attention.q_lora_rank,)
            shapes["q_b"] = (query, attention.q_lora_rank)
        latent = attention.kv_lora_rank
        shapes["kv_a"] = (latent + attention.qk_rope_head_dim, hidden)
        shapes["kv_norm"] = (latent,)
        shapes["kv_b"] = (heads * (attention.qk_nope_head_dim + attention.v_head_dim), latent)
        shapes["out"] = (hidden, heads * attention.v_head_dim)
    else:
        dim = attention.head_dim
        shapes["q"], shapes["out"] = (heads * dim, hidden), (hidden, heads * dim)
        shapes["k"] = shapes["v"] = (attention.num_kv_heads * dim, hidden)
    moe = spec.moe
    if not moe_layer or moe is None:
        shapes["gate_up"], shapes["down"] = (2 * spec.dense_ffn_size, hidden), (hidden, spec.dense_ffn_size)
        return shapes
    width = moe.expert_ffn_size
    shapes["router"], shapes["experts.gate_up"] = (moe.num_experts, hidden), (moe.num_experts, 2 * width, hidden)
    shapes["experts.down"] = (moe.num_experts, hidden, width)
    if moe.correction_bias:
        shapes["router.bias"] = (moe.num_experts,)
    if moe.num_shared_experts:
        shapes["shared.gate_up"] = (2 * moe.num_shared_experts * width, hidden)
        shapes["shared.down"] = (hidden, moe.num_shared_experts * width)
    return shapes


def _elements(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes.values())


@given(specs())
def test_totals_count_every_element_of_the_module_tree(spec):
    head = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    blocks = sum(
        _elements(_block_shapes(spec, spec.moe is not None and layer >= spec.num_dense_layers))
        for layer in range(spec.num_layers)
    )
    assert spec.total_parameters == spec.vocab_size * spec.hidden_size + blocks + spec.hidden_size + head
    module = _elements(_block_shapes(spec, spec.moe is not None)) + 2 * spec.hidden_size**2 + 3 * spec.hidden_size
    assert spec.mtp_parameters == spec.mtp_depth * module


@given(specs())
def test_active_leaves_out_the_experts_that_were_not_chosen(spec):
    idle = 0
    if spec.moe is not None:
        unused = spec.moe.num_experts - spec.moe.top_k
        idle = spec.num_moe_layers * unused * 3 * spec.hidden_size * spec.moe.expert_ffn_size
    assert spec.active_parameters == spec.total_parameters - idle


@given(specs())
def test_multiplied_parameters_are_the_active_matrices(spec):
    vectors = spec.hidden_size
    for layer in range(spec.num_layers):
        shapes = _block_shapes(spec, spec.is_moe_layer(layer))
        vectors += sum(prod(shape) for shape in shapes.values() if len(shape) == 1)
    embedding = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    assert spec.active_parameters_without_embedding == spec.active_parameters - vectors - embedding


@pytest.mark.parametrize("name", PRESETS)
def test_parts_sum_to_the_totals(name):
    spec = preset(name)
    assert sum(arithmetic.parameters_by_part(spec).values()) == spec.total_parameters
    assert sum(arithmetic.parameters_by_part(spec, active=True).values()) == spec.active_parameters
    assert sum(arithmetic.mtp_parameters_by_part(spec).values()) == spec.mtp_parameters


def test_deepseek_v3_has_its_published_size():
    spec = preset("deepseek-v3")
    billions = [
        spec.total_parameters,
        spec.active_parameters,
        spec.active_parameters_without_embedding,
        spec.mtp_parameters,
    ]
    assert [round(count / 1e9, 2) for count in billions] == [671.03, 37.55, 36.62, 11.61]


@pytest.mark.parametrize(
    ("name", "total", "multiplied"),
    [
        ("deepseek-v2", 236e9, 21e9),
        ("deepseek-v2-lite", 15.7e9, 2.4e9),
        ("deepseek-llm-7b", 6.9e9, None),
        ("deepseek-math-7b", 6.9e9, None),
        ("deepseek-llm-67b", 67e9, None),
    ],
)
def test_other_models_have_their_published_sizes(name, total, multiplied):
    spec = preset(name)
    assert spec.total_parameters == pytest.approx(total, rel=0.01)
    # The reports leave the embedding out of what they call activated: V2 has 20.9B without and 21.4B with it.
    if multiplied is not None:
        assert spec.active_parameters_without_embedding == pytest.approx(multiplied, rel=0.025)
    else:
        assert spec.active_parameters == spec.total_parameters


@pytest.mark.parametrize(
    ("name", "total", "mtp"), [("tiny", 4.97, 0.93), ("small", 105.05, 13.96), ("medium", 1060.42, 69.74)]
)
def test_small_models_have_their_sizes(name, total, mtp):
    spec = preset(name)
    assert (round(spec.total_parameters / 1e6, 2), round(spec.mtp_parameters / 1e6, 2)) == (total, mtp)


def test_cache_bytes_of_a_token():
    v3 = preset("deepseek-v3")
    assert v3.kv_cache_bytes_per_token == 70272
    assert arithmetic.kv_cache_bytes_per_token(v3, include_mtp=True) == 62 * 576 * 2
    assert arithmetic.kv_cache_bytes_per_token(v3, bytes_per_value=1) == 61 * 576
    assert arithmetic.kv_cache_bytes_per_token(v3, fp8=True) == 61 * 656 == 61 * (512 + 4 * 4 + 64 * 2)
    assert arithmetic.kv_cache_bytes_per_token(v3, include_mtp=True, fp8=True) == 62 * 656
    dense = preset("deepseek-llm-67b")
    assert arithmetic.kv_cache_bytes_per_token(dense, fp8=True) == 95 * 2 * 8 * (128 + 4)
    # 95 layers of keys and values of 8 heads of 128, in two bytes
    assert preset("deepseek-llm-67b").kv_cache_bytes_per_token == 95 * 2 * 8 * 128 * 2


def test_training_flops_of_a_token():
    v3 = preset("deepseek-v3")
    assert v3.training_flops_per_token() / 1e9 == pytest.approx(250.45, abs=0.005)
    assert v3.training_flops_per_token(4096) == v3.training_flops_per_token()
    assert preset("deepseek-v2").training_flops_per_token() / 1e9 == pytest.approx(155, abs=0.5)
    with_mtp = arithmetic.training_flops_per_token(v3, include_mtp=True)
    assert (with_mtp - v3.training_flops_per_token()) / 1e9 == pytest.approx(10.2, abs=0.05)


def test_attention_flops_double_without_the_causal_mask_and_grow_with_length():
    spec = preset("deepseek-v3")
    products = 6 * spec.active_parameters_without_embedding
    causal = arithmetic.training_flops_per_token(spec, 4096) - products
    assert causal == 3 * 2 * 61 * 128 * (192 + 128) * 4096 // 2
    assert arithmetic.training_flops_per_token(spec, 4096, causal=False) - products == 2 * causal
    assert spec.training_flops_per_token(8192) - products == 2 * causal


def test_tied_embeddings_still_cost_a_head():
    spec = preset("tiny")
    tied = replace(spec, tie_embeddings=True)
    assert tied.total_parameters == spec.total_parameters - spec.vocab_size * spec.hidden_size
    assert tied.training_flops_per_token(128) == spec.training_flops_per_token(128)


def test_prefill_is_a_third_of_training_when_every_position_has_logits():
    spec = preset("deepseek-v2")
    assert arithmetic.prefill_flops_per_token(spec, 4096, all_logits=True) * 3 == spec.training_flops_per_token(4096)
    saved = arithmetic.prefill_flops_per_token(spec, 4096, all_logits=True)
    saved -= arithmetic.prefill_flops_per_token(spec, 4096)
    assert saved == pytest.approx(2 * spec.vocab_size * spec.hidden_size * 4095 / 4096, abs=1)


def test_decode_absorbed_and_expanded():
    spec = preset("deepseek-v3")
    products = 2 * spec.active_parameters_without_embedding
    absorbed = arithmetic.decode_flops_per_token(spec, 1000)
    assert absorbed == products + 2 * 61 * 128 * (512 + 64 + 512) * 1000
    expanded = arithmetic.decode_flops_per_token(spec, 1000, absorbed=False)
    kv_b = 128 * (128 + 128) * 512
    assert expanded == products + 2 * 61 * (128 * (192 + 128) * 1000 + kv_b * 999)


def test_decode_of_grouped_query_attention():
    spec = preset("deepseek-llm-67b")
    products = 2 * spec.active_parameters_without_embedding
    assert arithmetic.decode_flops_per_token(spec, 10) == products + 2 * 95 * 64 * 256 * 10


def test_weight_bytes_in_each_format():
    spec = preset("deepseek-v3")
    biases = 58 * 256
    assert arithmetic.weight_bytes(spec, "fp32") == 4 * spec.total_parameters
    assert arithmetic.weight_bytes(spec, "bf16") == 2 * (spec.total_parameters - biases) + 4 * biases
    both = arithmetic.weight_bytes(spec, "bf16", include_mtp=True) - arithmetic.weight_bytes(spec, "bf16")
    assert both == 2 * (spec.mtp_parameters - 256) + 4 * 256


def test_the_published_repository_holds_copies_of_embedding_and_head():
    spec = preset("deepseek-v3")
    copies = 2 * spec.vocab_size * spec.hidden_size
    assert spec.total_parameters + spec.mtp_parameters + copies == pytest.approx(685e9, rel=1e-3)


@given(specs())
def test_fp8_is_never_below_a_byte_a_parameter(spec):
    assert spec.total_parameters < arithmetic.weight_bytes(spec, "fp8")
    assert arithmetic.weight_bytes(spec, "bf16") < arithmetic.weight_bytes(spec, "fp32")


def test_fp8_blocks_are_rounded_up():
    # tiny: kv_a has 48 rows and 128 columns, one block; kv_b 256 rows and 32 columns, two.
    spec = preset("tiny")
    by_hand = 0
    for layer in range(spec.num_layers):
        by_hand += 64 * 128 + 4 + 256 * 64 + 8 + 48 * 128 + 4 + 256 * 32 + 8 + 128 * 128 + 4  # q_a q_b kv_a kv_b out
        by_hand += 2 * (128 + 128 + 64 + 32)  # norms
        if layer == 0:
            by_hand += 3 * (352 * 128 + 4 * 3)
        else:
            by_hand += (16 + 1) * 3 * (128 * 128 + 4) + 2 * 16 * 128 + 4 * 16  # experts, gate, bias
    by_hand += 2 * 128 + 2 * 2 * 8192 * 128
    assert arithmetic.weight_bytes(spec, "fp8") == by_hand


def test_training_state():
    spec = preset("deepseek-v2")
    assert arithmetic.training_state_bytes(spec) == 18 * spec.total_parameters
    assert arithmetic.training_state_bytes(spec, moment_bytes=2) == 14 * spec.total_parameters
    v3 = preset("deepseek-v3")
    trained = v3.total_parameters + v3.mtp_parameters - 59 * 256
    assert arithmetic.training_state_bytes(v3) == 18 * trained + 4 * 59 * 256
