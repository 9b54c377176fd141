"""Weights as block-scaled FP8: E4M3 codes and one FP32 scale for each 128 x 128 block.  The reference in plain PyTorch.

DeepSeek-V3 (report section 3.3, figure 7b) scales weights by 128 x 128 blocks, so that an outlier coarsens its own
block alone.  Its checkpoints store ``weight`` in float8_e4m3fn beside ``weight_scale_inv``, which despite its name is
what a code is multiplied by: value = code x scale.  The scale of a block is its largest magnitude over 448, the largest
E4M3 number; with ``power_of_two`` it is the next power of two above (the UE8M0 scales of DeepSeek-V3.1), which costs at
most one bit of range and makes the multiplication exact.

Every function takes the whole matrix or any run of its rows that starts at a multiple of 128, under any leading axes,
and gives the same bytes either way: that is what lets a converter work in row blocks.  The codes are clamped before the
cast, because saturation on overflow differs between devices and formats (e5m2 goes to infinity).

Error bound.  For finite x in a block of scale s: |dequantise(quantise(x)) - x| <= max(2^-4 |x|, 2^-10 (1 + 2^-18) s).
2^-4 is half a step of three mantissa bits, 2^-10 half the smallest subnormal step; the rest is FP32 rounding of the
division and the product.  A cast of the result to BF16 adds 2^-8 relative.

The trade-off not taken: the smallest scale is the smallest normal FP32 number rather than DeepGEMM's 1e-4 / 448, so a
block of tiny weights keeps its three bits.

Legend: O rows (outputs), I columns (inputs), ``_oi`` the grid of blocks ceil(O / 128) x ceil(I / 128).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
"""Rows and columns of a block."""
E4M3_MAX = 448.0
"""The largest finite E4M3 number."""
SMALLEST_SCALE = 2.0**-126
"""The smallest normal FP32 number; a smaller scale would divide by zero or by a subnormal."""


def block_grid(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a ``rows`` x ``columns`` matrix; the last block of each axis may be ragged."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def block_scales(weight_OI: Tensor, power_of_two: bool = False) -> Tensor:
    """The FP32 scale of each block: amax / 448, rounded up to a power of two if asked; 1 for a block of zeros.

    Raises:
        ValueError: the weight holds an infinity or a NaN, with the position of its block.
    """
    amax_oi = _block_amax(weight_OI)
    if not torch.isfinite(amax_oi).all():
        *_, row, column = (~torch.isfinite(amax_oi)).nonzero()[0].tolist()
        raise ValueError(
            f"cannot be quantised to FP8: infinity or NaN in the block at row {row * BLOCK}, column {column * BLOCK}; "
            "repair the weights first"
        )
    scales_oi = (amax_oi / E4M3_MAX).clamp_(min=SMALLEST_SCALE)
    if power_of_two:
        mantissa_oi, exponent_oi = torch.frexp(scales_oi)  # scale = mantissa x 2^exponent, mantissa in [0.5, 1)
        exponent_oi = exponent_oi - (mantissa_oi == 0.5).to(exponent_oi.dtype)
        scales_oi = torch.ldexp(torch.ones_like(scales_oi), exponent_oi)
    return torch.where(amax_oi == 0, torch.ones_like(scales_oi), scales_oi)


def quantise_with_scales(weight_OI: Tensor, scales_oi: Tensor) -> Tensor:
    """E4M3 codes of ``weight_OI`` for scales already chosen: round to nearest even of weight / scale, clamped to 448.

    Dequantised codes come back as themselves, all 256 of them (a NaN code as a NaN code).
    """
    scaled_OI = weight_OI.to(torch.float32, copy=True)
    for values, scales in _pair_blocks(scaled_OI, scales_oi):
        values.div_(scales)
    return scaled_OI.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantise_blocks(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn, shape of the weight) and scales (FP32, one a block) of a floating-point weight.

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    scales_oi = block_scales(weight_OI, power_of_two)
    return quantise_with_scales(weight_OI, scales_oi), scales_oi


def dequantise_blocks(codes_OI: Tensor, scales_oi: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, multiplied in FP32 (FP64 for FP64) and rounded once to ``dtype``.

    ``scales_oi`` may have any floating dtype, among them float8_e8m0fnu.
    """
    working = torch.float64 if dtype == torch.float64 else torch.float32
    values_OI = codes_OI.to(working)
    for values, scales in _pair_blocks(values_OI, scales_oi.to(working)):
        values.mul_(scales)
    return values_OI.to(dtype)


def _block_amax(weight_OI: Tensor) -> Tensor:
    rows, columns = weight_OI.shape[-2:]
    if rows % BLOCK or columns % BLOCK:
        weight_OI = functional.pad(weight_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = weight_OI.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # ..., o, 128, i, 128
    highest, lowest = blocks.amax(dim=-3).amax(dim=-1), blocks.amin(dim=-3).amin(dim=-1)  # no |weight| in memory
    return torch.maximum(highest, -lowest).float()


def _pair_blocks(values_OI: Tensor, scales_oi: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the values and scales that broadcast over them: the whole rows of blocks, then the ragged last one.

    Only the columns of the scales are repeated (1/128 of the matrix); rows broadcast.
    """
    rows, columns = values_OI.shape[-2:]
    expected = (*values_OI.shape[:-2], *block_grid(rows, columns))
    if tuple(scales_oi.shape) != expected:
        raise ValueError(
            f"scales of shape {tuple(scales_oi.shape)} do not fit a weight of shape {tuple(values_OI.shape)}: "
            f"one scale for each 128 x 128 block makes {expected}"
        )
    whole = rows // BLOCK
    scales_oI = scales_oi.repeat_interleave(BLOCK, dim=-1)[..., :columns]
    pairs = [(values_OI[..., : whole * BLOCK, :].unflatten(-2, (whole, BLOCK)), scales_oI[..., :whole, None, :])]
    if rows % BLOCK:
        pairs.append((values_OI[..., whole * BLOCK :, :], scales_oI[..., whole:, :]))
    return pairs
