"""What a layer keeps for its backward is what the recipe's table says, to the byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from abyssal.model.block import Block
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from abyssal.precision.kept import kept_activations, kept_bytes, kept_pairs
from abyssal.precision.recipe import Fp8Options, Recipe, Recomputed, fp8_recipe
from abyssal.spec.model import ModelSpec
from abyssal.spec.presets import preset
from tests.support.kept import kept_storages

SMALL = replace(preset("small"), num_layers=2, vocab_size=64, mtp_depth=0, dense_ffn_size=500)
assert SMALL.moe is not None
SMALL = replace(SMALL, moe=replace(SMALL.moe, num_experts=8))
WITHOUT_QUERY_LATENT = replace(SMALL, attention=replace(SMALL.attention, q_lora_rank=None))
LENGTHS = [70, 70]
EVERYTHING: tuple[Recomputed, ...] = ("norm", "up_projection", "swiglu")
BF16 = Recipe(activations="bfloat16")
RECIPES = {
    "bf16": BF16,
    "bf16, recomputed": replace(BF16, recompute=frozenset(EVERYTHING)),
    "fp32": Recipe(activations="float32"),
    "fp8": fp8_recipe(),
    "fp8, as the paper recomputes": fp8_recipe(recompute=("norm", "up_projection")),
    "fp8, everything recomputed": fp8_recipe(recompute=EVERYTHING),
    "fp8, FP32 scales": fp8_recipe(Fp8Options(scales="float32")),
    "fp8, activations otherwise kept": fp8_recipe(
        Fp8Options(after_attention="activation", swiglu_input="activation", dispatch="activation")
    ),
    "fp8 with islands": fp8_recipe(Fp8Options(high_precision=("q_a", "out", "experts.down", "shared.gate_up"))),
    "fp8, experts an island": fp8_recipe(Fp8Options(high_precision=("experts.gate_up", "kv_b", "dense.down"))),
    "fp8 of FP32 activations": fp8_recipe(activations="float32"),
}


def sizes_kept(spec: ModelSpec, recipe: Recipe, layer: int) -> Counter[int]:
    """Sizes in bytes of everything a layer keeps but its weights' operands and the rotation."""
    model = Transformer(spec, recipe)
    model.init_weights(torch.Generator().manual_seed(0))
    step = model.step(PackedBatch(LENGTHS))
    dtype = torch.float32 if recipe.activations == "float32" else torch.bfloat16
    x_TD = torch.randn(sum(LENGTHS), spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    # A block hands the residual stream on, and its input is kept by its own norm: as one in the middle of a model has.
    block: Block = model.layers[layer]  # pyright: ignore[reportAssignmentType]
    found = kept_storages(block, (x_TD * 1.0).requires_grad_(), step)
    rotation = step.rotation.turns.untyped_storage().data_ptr()
    weights = {tuple(shape) for parameter in block.parameters() for shape in _operand_shapes(parameter)}
    return Counter(size for address, (size, shape, _) in found.items() if address != rotation and shape not in weights)


def _operand_shapes(parameter: torch.Tensor) -> list[tuple[int, ...]]:
    """Of a weight's codes and scales, also as two matrices."""
    *stack, rows, columns = (1, *parameter.shape) if parameter.ndim == 1 else parameter.shape
    whole, halves = (*stack, rows, columns), (*stack, 2, rows // 2, columns)
    scales = [(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)) for shape in (whole, halves)]
    return [whole, halves, *scales]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "mixture"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_keeps_what_the_table_says(name: str, layer: int) -> None:
    recipe, spec = RECIPES[name], SMALL
    assert spec.moe is not None
    table = kept_activations(spec, recipe, dense=layer == 0)
    tokens = sum(LENGTHS)
    expected = kept_bytes(table, tokens, tokens * spec.moe.top_k, kept_pairs(LENGTHS))
    found = sizes_kept(spec, recipe, layer)
    assert sum(size * number for size, number in found.items()) == expected, (found, table)


def test_a_query_without_a_latent() -> None:
    table = kept_activations(WITHOUT_QUERY_LATENT, fp8_recipe(), dense=True)
    expected = kept_bytes(table, sum(LENGTHS), 0, kept_pairs(LENGTHS))
    found = sizes_kept(WITHOUT_QUERY_LATENT, fp8_recipe(), 0)
    assert sum(size * number for size, number in found.items()) == expected, (found, table)


def test_fp8_keeps_about_half_of_bf16_but_for_the_softmax_weights() -> None:
    """V3's own sizes, as its planner would add them up."""
    spec = preset("deepseek-v3")
    assert spec.moe is not None
    tokens, rows = 4096, 4096 * spec.moe.top_k
    bf16, fp8, paper = (
        kept_bytes(kept_activations(spec, RECIPES[name], dense=False), tokens, rows)
        for name in ("bf16", "fp8", "fp8, as the paper recomputes")
    )
    assert paper < fp8 < 0.75 * bf16
    assert paper < 0.4 * bf16


def test_what_the_table_does_not_know() -> None:
    with pytest.raises(ValueError, match="latent attention"):
        kept_activations(preset("deepseek-llm-7b"), BF16, dense=True)
    with pytest.raises(ValueError, match="activations is 'parameter'"):
        kept_activations(SMALL, Recipe(), dense=True)
