"""Rotary position embedding and its YaRN extension.

DeepSeek's latent attention rotates interleaved pairs (0,1), (2,3), ...; the Llama layout of the dense family rotates
halves.  YaRN changes the frequencies of the rotary part only, and enters the softmax scale through
:func:`softmax_scale` (arXiv 2309.00071; V2 report section 3.1.4, V3 report section 4.3).

Legend: T tokens, R rotary width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.rotary import native as native_rotary
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, YarnSpec


@dataclass(frozen=True)
class Rotation:
    """The turn of each token's pairs, cos + i sin, complex (T, R/2) of FP32 parts (FP64 for FP64 models)."""

    turns: Tensor
    interleaved: bool


def _yarn_m(factor: float, mscale: float) -> float:
    """m(mscale) = 0.1 · mscale · ln(factor) + 1; 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_frequencies(base: Tensor, dim: int, theta: float, yarn: YarnSpec) -> Tensor:
    """Blend each frequency with its interpolated one: fast ones stay, slow ones are divided by the factor."""

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(yarn.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    slow = ((torch.arange(dim // 2, dtype=torch.float64, device=base.device) - low) / span).clamp(0, 1)
    return base / yarn.factor * slow + base * (1 - slow)


def rope_frequencies(spec: ModelSpec, device: torch.device | None = None) -> Tensor:
    """(R/2,) radians a position of each pair, FP64."""
    dim = spec.attention.rope_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    base = spec.rope_theta**-exponents
    return base if spec.yarn is None else _yarn_frequencies(base, dim, spec.rope_theta, spec.yarn)


def _magnitude(yarn: YarnSpec | None) -> float:
    """What YaRN multiplies cos and sin by: 1 when both mscale fields agree, m(1) when they are absent."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _yarn_m(yarn.factor, yarn.mscale) / _yarn_m(yarn.factor, yarn.mscale_all_dim)
    return _yarn_m(yarn.factor, 1.0)


def rotation(spec: ModelSpec, positions_T: Tensor, dtype: torch.dtype, frequencies: Tensor | None = None) -> Rotation:
    """The rotation of each position, computed in FP64 so that positions beyond 100K keep their angle.

    ``frequencies`` are those of :func:`rope_frequencies`, from a caller that has kept them."""
    if frequencies is None:
        frequencies = rope_frequencies(spec, positions_T.device)
    angles = positions_T.to(torch.float64)[:, None] * frequencies
    wide, scale = torch.promote_types(dtype, torch.float32), _magnitude(spec.yarn)
    return Rotation(torch.polar(torch.full_like(angles, scale), angles).to(wide.to_complex()), spec.rope_interleaved)


def apply_rotation(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last axis of ``x``, (T, R) or (T, H, R); computed in FP32 at least, rounded once."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        y = native_rotary(x, rotation.turns, rotation.interleaved)
        if y is not None:
            return y
    turns = rotation.turns if x.dim() == 2 else rotation.turns[:, None]
    wide = x.to(turns.real.dtype)
    if rotation.interleaved:
        pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    cos, sin = turns.real, turns.imag
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def softmax_scale(spec: ModelSpec) -> float:
    """Factor on the attention scores: the width of query and key to the power −½, times m(mscale_all_dim)² in MLA."""
    attention = spec.attention
    if not isinstance(attention, LatentAttentionSpec):
        return attention.head_dim**-0.5
    scale = attention.qk_head_dim**-0.5
    if spec.yarn is not None and spec.yarn.mscale_all_dim:
        scale *= _yarn_m(spec.yarn.factor, spec.yarn.mscale_all_dim) ** 2
    return scale
