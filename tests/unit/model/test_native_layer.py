"""A decode step as one native call a layer has the bits of the stages, and gives way where it is not the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.kernels import layer as op
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.model import native_layer
from abyssal.model.lora import LoraConfig, add_lora
from abyssal.model.native_layer import NativeLayer
from abyssal.model.transformer import Transformer
from abyssal.precision.recipe import Recipe
from abyssal.spec.model import ModelSpec
from abyssal.spec.parts import LatentAttentionSpec
from abyssal.spec.placement import Placement
from tests.support.checkpoints import SMALL, random_model
from tests.support.parity import draw_spec

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
PAST = (2 * PAGE + 5, PAGE - 1, 0, 3)
"""Entries before the new tokens of each sequence."""


def parts_of(queries: list[int]) -> list[PagedTokens]:
    """New tokens after :data:`PAST`, on pages 0, 1, 2, ... in an order of their own."""
    parts, free = [], [11, 3, 8, 0, 5, 9, 1, 7, 2, 10]
    for past, count in zip(PAST, queries, strict=False):
        pages = tuple(free.pop() for _ in range(-(-(past + count) // PAGE)))
        parts.append(PagedTokens(past, count, pages, True))
    return parts


class Decode:
    """One step over random entries; every run begins from the same cache."""

    def __init__(self, model: Transformer, dtype: torch.dtype, queries: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model, self.parts = model, parts_of(queries)
        self.tokens_T = torch.randint(model.spec.vocab_size, (sum(queries),), generator=generator)
        self.cache = PagedCache(model.spec, 12, dtype)
        self.cache.entries_PLSX.copy_(torch.randn(self.cache.entries_PLSX.shape, generator=generator))
        self.before_PLSX = self.cache.entries_PLSX.clone()

    def run(self, native: bool, **fields) -> tuple[Tensor, Tensor, dict, int]:
        """Hidden states, entries and routings after the step, and in how many layers the native one ran."""
        self.cache.entries_PLSX.copy_(self.before_PLSX)
        ran = []

        def counted(layer: NativeLayer, block, x_TD, step):
            y_TD = original(layer, block, x_TD, step) if native else None
            ran.extend([block.layer] * (y_TD is not None))
            return y_TD

        original = NativeLayer.run
        with torch.inference_mode(), patch.object(NativeLayer, "run", counted):
            step = self.model.step(PagedBatch(self.cache, self.parts), **fields)
            hidden_TD = self.model.hidden(self.tokens_T, step)
            for depth in range(len(self.model.mtp)):
                hidden_TD = self.model.mtp_hidden(depth, self.tokens_T, hidden_TD, step)
        return hidden_TD, self.cache.entries_PLSX.clone(), step.routings, len(ran)

    def same(self, **fields) -> int:
        """Assert that both ways give the same bits; in how many layers the native one ran."""
        wanted, got = self.run(False, **fields), self.run(True, **fields)
        assert wanted[3] == 0
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert got[2].keys() == wanted[2].keys()
        for layer, routing in wanted[2].items():
            for name in ("expert_ids_TK", "weights_TK", "scores_TE"):
                assert torch.equal(getattr(got[2][layer], name), getattr(routing, name)), (layer, name)
        assert got[0].isfinite().all()
        return got[3]


def layers(model: Transformer) -> int:
    return len(model.blocks())


def specs() -> dict[str, ModelSpec]:
    assert isinstance(SMALL.attention, LatentAttentionSpec) and SMALL.moe is not None
    return {
        "v3": replace(SMALL, mtp_depth=2),
        "without query latent": replace(SMALL, attention=replace(SMALL.attention, q_lora_rank=None)),
        "without shared experts": replace(SMALL, moe=replace(SMALL.moe, num_shared_experts=0)),
        "rotated halves": replace(SMALL, rope_interleaved=False),
        "dense": replace(SMALL, moe=None, num_dense_layers=0),
        "v2": draw_spec("deepseek_v2", 1),
        "v2 grouped": draw_spec("deepseek_v2", 4),
        "v3 drawn": draw_spec("deepseek_v3", 5),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", specs())
def test_one_call_a_layer_has_the_bits_of_its_stages(name: str, dtype: torch.dtype) -> None:
    spec = replace(specs()[name], max_positions=4 * PAGE)
    model = random_model(spec, dtype=dtype)
    for queries in ([1], [1, 1, 1, 1], [3, 1, 2, 4]):
        assert Decode(model, dtype, queries).same() == layers(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_the_same_alone_on_every_instruction_set_and_any_number_of_threads(dtype: torch.dtype) -> None:
    model, name, before = random_model(SMALL, dtype=dtype), isa_name(), torch.get_num_threads()
    decode, alone = Decode(model, dtype, [2, 1, 1]), Decode(model, dtype, [2])
    alone.tokens_T, alone.before_PLSX = decode.tokens_T[:2], decode.before_PLSX
    wanted = decode.run(True)[0]
    try:
        torch.set_num_threads(3)
        assert torch.equal(decode.run(True)[0], wanted)
    finally:
        torch.set_num_threads(before)
    assert name is not None
    for isa in range(ISA_NAMES.index(name) + 1):
        with patch.object(native_layer, "layer", lambda *args, isa=isa: op.layer(*args, isa_limit=isa)):
            together_TD = decode.run(True)[0]
            assert together_TD.isfinite().all() and torch.equal(alone.run(True)[0], together_TD[:2])


def test_bf16_weights_under_fp32_activations() -> None:
    spec = replace(SMALL, max_positions=4 * PAGE)
    model = Transformer(spec, Recipe(activations="float32"), dtype=torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    assert Decode(model, torch.float32, [1, 2]).same() == layers(model)


def test_fp32_weights_under_bf16_activations_take_the_stages() -> None:
    model = Transformer(SMALL, Recipe(activations="bfloat16"))
    model.init_weights(torch.Generator().manual_seed(0))
    assert Decode(model, torch.bfloat16, [1, 2]).same() == 0


def test_what_the_native_layer_does_not_know_takes_the_stages() -> None:
    assert SMALL.moe is not None
    experts, moe_layers = SMALL.moe.num_experts, [*random_model(SMALL).placements()]
    replicas = Placement(experts, (*range(experts), 0))
    swapped = Placement(experts, (1, 0, *range(2, experts)))
    for placement in (replicas, swapped):
        model = random_model(SMALL, placements={moe_layers[0]: placement})
        assert Decode(model, torch.float32, [1, 2]).same() == layers(model) - 1
    model = random_model(SMALL)
    decode = Decode(model, torch.float32, [1, 2])
    ids_TK = torch.arange(SMALL.moe.top_k).expand(3, -1).contiguous()
    assert decode.same(forced_routing={moe_layers[0]: ids_TK}) == layers(model) - 1
    handle = model.layers[0].ffn_norm.register_forward_hook(lambda module, args, out: out * 2)  # type: ignore[union-attr]
    assert decode.same() == layers(model) - 1
    handle.remove()
    assert decode.same() == layers(model)
    add_lora(model, LoraConfig(2, targets=("attention",), mtp=False), torch.Generator().manual_seed(0))
    assert decode.same() == SMALL.mtp_depth
    assert Decode(random_model(SMALL, dtype=torch.float64), torch.float64, [1, 2]).same() == 0


def test_a_step_with_prefill_or_with_gradients_takes_the_stages() -> None:
    model = random_model(SMALL)
    decode = Decode(model, torch.float32, [1, 2])
    decode.parts[0] = replace(decode.parts[0], absorbed=False)
    assert decode.same() == 0
    assert PagedBatch(PagedCache(SMALL, 2, torch.float32), []).paged is None
    decode = Decode(model, torch.float32, [1, 2])
    with patch.object(NativeLayer, "run", side_effect=AssertionError):
        model.hidden(decode.tokens_T, model.step(PagedBatch(decode.cache, decode.parts)))


def test_weights_are_read_where_they_are_now() -> None:
    """In place, replaced, moved to another dtype and back, another module, a copy of the model: never the old ones."""
    model = random_model(SMALL)
    decode = Decode(model, torch.float32, [1, 2])
    total = layers(model)
    seen = [decode.run(True)[0]]

    def changed() -> None:
        assert decode.same() == total
        seen.append(decode.run(True)[0])
        assert not torch.equal(seen[-1], seen[-2])

    block = model.layers[1]
    with torch.no_grad():
        block.attention.kv_b.weight.mul_(1.5)  # type: ignore[union-attr]
        changed()
        block.ffn.experts.w_down_EDF = torch.nn.Parameter(block.ffn.experts.w_down_EDF * 2)  # type: ignore[union-attr]
        changed()
        block.ffn_norm.weight.data = block.ffn_norm.weight.data * 2  # type: ignore[union-attr]
        changed()
        block.ffn.router.bias_E = torch.linspace(3, -3, len(block.ffn.router.bias_E))  # type: ignore[union-attr]
        changed()
        block.attention_norm = copy.deepcopy(model.layers[0].ffn_norm)  # type: ignore[union-attr]
        changed()
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    changed()
    other = copy.deepcopy(model)
    other.layers[0].attention.out.weight.data.mul_(2)  # type: ignore[union-attr]
    decode.model = other
    changed()
    decode.model = model
    changed()
    model.to(torch.float64).to(torch.float32)
    assert decode.same() == total
    model.refresh(3)
    assert model.layers[0].native._held is None and decode.same() == total  # type: ignore[union-attr]


def test_slots_and_pages_outside_the_cache_are_refused() -> None:
    model = random_model(SMALL)
    decode = Decode(model, torch.float32, [1])
    with torch.inference_mode():
        for page in (-1, 12):
            step = model.step(PagedBatch(decode.cache, [PagedTokens(5, 1, (page,), True)]))
            with pytest.raises(AssertionError, match="abyssal_layer returned"):
                model.hidden(decode.tokens_T, step)
