"""Random small models beside transformers' own, with the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from abyssal.checkpoint.hf import save_model
from abyssal.checkpoint.names import Piece, checkpoint_table
from abyssal.model.experts import MoE
from abyssal.model.transformer import Transformer
from abyssal.spec.model import (
    Family,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    MoESpec,
    YarnSpec,
)


def draw_spec(family: Family, seed: int) -> ModelSpec:
    """A small model of ``family``; consecutive seeds toggle each option so that a few cover them all."""
    rng = random.Random(seed)
    heads, layers, vocab_size = rng.choice([2, 3, 4]), rng.choice([2, 3]), rng.randint(40, 90)
    hidden = 8 * heads * rng.choice([1, 2])
    yarn = None
    if seed % 2:
        mscale = rng.choice([1.0, 0.707]) if family != "llama" else None
        yarn = YarnSpec(rng.choice([4.0, 40.0]), 16, rng.choice([32.0, 8.0]), 1.0, mscale, mscale)
    attention = (
        GroupedQueryAttentionSpec(heads, rng.choice([1, heads]), 2 * rng.randint(2, 8))
        if family == "llama"
        else LatentAttentionSpec(
            heads,
            4 * rng.randint(2, 6) if seed % 3 else None,
            4 * rng.randint(2, 8),
            2 * rng.randint(2, 8),
            2 * rng.randint(2, 6),
            2 * rng.randint(2, 12),
        )
    )
    groups, kept = rng.choice([(1, 1), (4, 2), (3, 2)]) if seed else (4, 2)
    sigmoid, num_experts = family == "deepseek_v3", groups * rng.randint(3, 5)
    moe = MoESpec(
        num_experts=num_experts,
        num_shared_experts=rng.choice([1, 2]),
        top_k=min(rng.randint(2, 4), num_experts - 1),  # else there is no choice to get wrong
        expert_ffn_size=rng.randint(8, 24),
        num_groups=groups,
        num_kept_groups=kept,
        scoring="sigmoid" if sigmoid else "softmax",
        renormalise=sigmoid and bool(seed % 4),
        route_scale=rng.choice([1.0, 2.5]),
        correction_bias=sigmoid,
    )
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        dense_ffn_size=rng.randint(16, 48),
        attention=attention,
        moe=None if family == "llama" else moe,
        num_dense_layers=0 if family == "llama" else seed % 2,
        max_positions=128,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        rope_theta=rng.choice([10000.0, 50000.0]),
        yarn=yarn,
        rope_interleaved=family != "llama",
        tie_embeddings=seed % 3 == 1,
        init_std=0.02,
        bos_token_id=0,
        eos_token_id=1,
    )


@torch.no_grad()
def random_model(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """Weights large enough that every path matters; norms and correction biases away from their initial values."""
    model = Transformer(spec, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    for buffer in model.buffers():
        buffer.uniform_(-0.2, 0.2, generator=generator)
    return model


def moe_of(model: Transformer, layer: int) -> MoE:
    """The mixture of one layer."""
    ffn = model.blocks()[layer].ffn
    assert isinstance(ffn, MoE)
    return ffn


def random_tokens(spec: ModelSpec, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, spec.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_transformers(model: Transformer, folder: Path, **options: Any) -> Any:
    """``model`` as transformers loads it from a folder written here."""
    save_model(model, folder, "fp32")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager", **options
    )


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-30))


def their_gradient(piece: Piece, gradients: dict[str, Tensor]) -> Tensor:
    """The gradient that transformers, which stacks experts too, holds for one tensor of the checkpoint."""
    prefix, found, rest = piece.hf_name.partition(".mlp.experts.")
    if not found:
        return gradients[piece.hf_name]
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return gradients[f"{prefix}.mlp.experts.down_proj"][int(expert)]
    half = gradients[f"{prefix}.mlp.experts.gate_up_proj"][int(expert)].chunk(2)
    return half[0] if projection == "gate_proj" else half[1]


def our_gradient(piece: Piece, model: Transformer) -> Tensor:
    parameter = model.get_parameter(piece.parameter)
    assert parameter.grad is not None, piece.parameter
    gradient = parameter.grad if piece.expert is None else parameter.grad[piece.expert]
    return gradient if piece.rows is None else gradient[slice(*piece.rows)]


def compared_gradients(model: Transformer, theirs: Any) -> list[tuple[str, float]]:
    """Each tensor's name and relative difference; a gradient that is zero there (an expert unused) is zero here."""
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    pieces = [piece for piece in checkpoint_table(model.spec, include_mtp=False) if piece.parameter not in buffers]
    pieces = [piece for piece in pieces if not piece.optional]
    return [
        (piece.hf_name, relative_difference(our_gradient(piece, model), their_gradient(piece, gradients)))
        for piece in pieces
    ]
