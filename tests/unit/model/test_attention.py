"""Latent attention: expanded and absorbed agree; a cache gives what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels.attention import attention, attention_reference
from abyssal.kernels.latent_attention import latent_attention
from abyssal.model.context import PackedBatch
from abyssal.spec.model import Family
from tests.support.cached import CachedSequence
from tests.support.parity import draw_spec, random_model, random_tokens, relative_difference

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.06}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_expanded_equals_absorbed(family: Family, seed: int, dtype: torch.dtype) -> None:
    model = random_model(draw_spec(family, seed), seed, dtype)
    x_TD = torch.randn(30, model.spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for absorbed in (False, True):
        step = model.step(PackedBatch([12, 12, 6], absorbed=absorbed))
        attention_module = model.layers[0].attention
        query, entries = attention_module.project(x_TD, 0, step)  # type: ignore[operator,union-attr]
        results.append(attention_module.attend(query, entries, 0, step))  # type: ignore[operator,union-attr]
    assert relative_difference(results[1].double(), results[0].double()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
@pytest.mark.parametrize("seed", [1, 2])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family: Family, seed: int, dtype: torch.dtype) -> None:
    """A prompt in two chunks, then tokens one by one, absorbed; each against the whole sequence at once.

    The experts of the whole sequence are forced on the cached steps: in BF16 a rounding may change a choice.
    """
    spec = draw_spec(family, seed)
    model = random_model(spec, seed, dtype)
    tokens = random_tokens(spec, 1, 21)[0]
    whole = model.step(PackedBatch([21]))
    expected = model.logits(model.hidden(tokens, whole))
    cache = CachedSequence(spec, 21, dtype)
    pieces, start = [], 0
    for length in (7, 5, 1, 1, 4, 1, 1, 1):
        rows = slice(start, start + length)
        forced = {layer: routing.expert_ids_TK[rows] for layer, routing in whole.routings.items()}
        step = model.step(cache.extend(length, absorbed=start >= 12), forced_routing=forced)
        pieces.append(model.logits(model.hidden(tokens[start : start + length], step)))
        start += length
    assert relative_difference(torch.cat(pieces).double(), expected.double()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("queries", "past"), [(9, 0), (1, 8), (4, 5)])
@pytest.mark.parametrize(("width", "value", "kv_heads"), [(24, 16, 4), (16, 24, 4), (8, 8, 2)])
def test_fused_attention_equals_its_reference(
    dtype: torch.dtype, queries: int, past: int, width: int, value: int, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = queries + past
    q = torch.randn(2, queries, 4, width, generator=generator).to(dtype)
    k = torch.randn(2, keys, kv_heads, width, generator=generator).to(dtype)
    v = torch.randn(2, keys, kv_heads, value, generator=generator).to(dtype)
    wide_k, wide_v = (tensor.repeat_interleave(4 // kv_heads, 2) for tensor in (k, v))
    expected = attention_reference(q, wide_k, wide_v, past, 0.3)
    actual = attention(q, k, v, past, 0.3)
    bound = {torch.float64: 1e-12, torch.float32: 2.0**-22 * keys, torch.bfloat16: 2.0**-7}[dtype]
    assert relative_difference(actual.double(), expected.double()) < bound


def test_latent_attention_is_attention_with_one_shared_head() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 12, generator=generator, dtype=torch.float64)
    entries = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)
    shared = entries[:, :, None].expand(-1, -1, 4, -1)
    expected = attention_reference(q, shared, shared[..., :8], 4, 0.5)
    assert torch.allclose(latent_attention(q, entries, 8, 4, 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("queries", [1, 3])
def test_no_query_sees_keys_after_its_own(dtype: torch.dtype, queries: int) -> None:
    """A cache may hold more than the queries may see (a draft's tokens, another micro-batch's)."""
    q, entries = torch.randn(1, queries, 4, 8, dtype=dtype), torch.randn(1, 9, 8, dtype=dtype)
    keys = entries[:, :, None].expand(-1, -1, 4, -1)
    bound = 1e-12 if dtype == torch.float64 else 2.0**-22 * 9
    for actual in (attention(q, keys, keys, 4, 0.5), latent_attention(q, entries, 8, 4, 0.5)):
        assert relative_difference(actual, attention_reference(q, keys, keys, 4, 0.5)) < bound


def test_sequences_of_a_packed_batch_do_not_see_each_other() -> None:
    spec = draw_spec("deepseek_v3", 1)
    model = random_model(spec, dtype=torch.float64)
    tokens = random_tokens(spec, 1, 17)[0]
    alone = [model(part[None])[0] for part in tokens.split([5, 5, 7])]
    together = model.logits(model.hidden(tokens, model.step(PackedBatch([5, 5, 7]))))
    assert relative_difference(together, torch.cat(alone)) < 1e-12


def test_packed_batch_refuses_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="lengths"):
        PackedBatch([])
    with pytest.raises(ValueError, match="lengths"):
        PackedBatch([3, 0])
    with pytest.raises(ValueError, match=r"positions_T.*5 tokens"):
        PackedBatch([3, 2], torch.arange(4))


def test_model_refuses_bad_tokens() -> None:
    spec = draw_spec("llama", 0)
    model = random_model(spec)
    with pytest.raises(ValueError, match="max_positions 128"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.full((1, 4), spec.vocab_size))
    with pytest.raises(ValueError, match="batch"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        model(torch.zeros(1, 4))
