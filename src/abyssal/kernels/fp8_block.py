"""Weights as block-scaled FP8, as checkpoints store them: E4M3 codes and one scale for each 128 x 128 block.

DeepSeek-V3 (report section 3.3, figure 7b) scales weights by 128 x 128 blocks, so that an outlier coarsens its own
block alone.  Its checkpoints store ``weight`` in float8_e4m3fn beside ``weight_scale_inv``, which despite its name is
what a code is multiplied by: value = code x scale.  ``power_of_two`` makes the scales of DeepSeek-V3.1 (UE8M0).

The bytes and their error bound are those of ``128x128`` tiles in :mod:`~abyssal.kernels.fp8_tiles`.  What is added is
the checkpoint's side of it: weights that are not finite are refused, because a NaN in a file helps nobody, and scales
may have come in any dtype.

Every function takes the whole matrix or any run of its rows that starts at a multiple of 128, under any leading axes,
and gives the same bytes either way: that is what lets a converter work in row blocks.

The trade-off not taken: the smallest scale is the smallest normal FP32 number rather than DeepGEMM's 1e-4 / 448, so a
block of tiny weights keeps its three bits.

Legend: O rows (outputs), I columns (inputs), ``_oi`` the grid of blocks ceil(O / 128) x ceil(I / 128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, dequantise, quantise
from abyssal.spec.tile_format import TILE, TileFormat, tiles_along

BLOCK = TILE
"""Rows and columns of a block."""
_ANY_SCALE = TileFormat("e4m3", "128x128", "float32")
_POWERS = TileFormat("e4m3", "128x128", "ue8m0")


def block_grid(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a ``rows`` x ``columns`` matrix; the last block of each axis may be ragged."""
    return tiles_along(rows), tiles_along(columns)


def quantise_blocks(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn, shape of the weight) and scales (FP32, one a block) of a floating-point weight.

    Raises:
        ValueError: the weight holds an infinity or a NaN, with the position of its block.
    """
    quantised = quantise(weight_OI, _POWERS if power_of_two else _ANY_SCALE)
    scales_oi = quantised.scales.float()
    if quantised.bad_tiles():
        *_, row, column = scales_oi.isnan().nonzero()[0].tolist()
        raise ValueError(
            f"cannot be quantised to FP8: infinity or NaN in the block at row {row * BLOCK}, column {column * BLOCK}; "
            "repair the weights first"
        )
    return quantised.codes, scales_oi


def dequantise_blocks(codes_OI: Tensor, scales_oi: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, multiplied in FP32 (FP64 for FP64) and rounded once to ``dtype``.

    ``scales_oi`` may have any floating dtype, among them float8_e8m0fnu.

    Raises:
        ValueError: scales of another shape than the blocks'.
    """
    expected = (*codes_OI.shape[:-2], *block_grid(*codes_OI.shape[-2:]))
    if tuple(scales_oi.shape) != expected:
        raise ValueError(
            f"scales of shape {tuple(scales_oi.shape)} do not fit a weight of shape {tuple(codes_OI.shape)}: "
            f"one scale for each 128 x 128 block makes {expected}"
        )
    return dequantise(Quantised(codes_OI, scales_oi.float(), _ANY_SCALE, codes_OI.shape[-1]), dtype)
