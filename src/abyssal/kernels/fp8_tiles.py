"""Tensors quantised tile by tile: codes, scales, and back [V3 section 3.3.2, figure 7].

The functions here define what the bytes are on every machine; the formats are those of
:mod:`~abyssal.spec.tile_format`.  A scale is amax / largest code, at least 2^-126, in FP32, then rounded up to a power
of two for UE8M0; 1 for a tile of zeros.  A code is value / scale in FP32, clamped to the finite codes and rounded to
nearest, ties to even.  A tile with an infinity or a NaN has a NaN as its scale and one NaN code throughout, so that it
comes back as NaN and spoils what it is multiplied into, where the trainer's guard sees it.

The definition is :mod:`~abyssal.kernels.fp8_tiles_reference`, in PyTorch; where the C++ of
:mod:`~abyssal.kernels.fp8_tiles_native` applies it runs instead, in one pass over memory, with the same bytes.
Rounding has no gradient, so results never require one.

Error bound.  For |x| up to 2^127 in a tile of scale s, m mantissa bits and smallest normal code 2^e:
|dequantised - x| <= max(2^-(m+1) |x|, 2^(e-m-1) s) (1 + 2^-16) + 2^-149.  A cast to BF16 adds 2^-8 relative and
2^-134, half of its smallest step, where the scale is no power of two, and nothing where it is one of 2^-113 or more:
seven significant bits are the most that a code has.  Above 2^127 a value may round to infinity.

Legend: T rows, I columns, ``_Ti`` scales by row and tile of columns, ``_tI`` by tile of rows and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels import fp8_tiles_native as native
from abyssal.kernels import fp8_tiles_reference as reference
from abyssal.spec.tile_format import TileFormat


@dataclass(frozen=True)
class Quantised:
    """A tensor as codes and scales.

    Attributes:
        codes: (..., rows, columns) in float8_e4m3fn or float8_e5m2; E5M6 packed in uint8, (..., rows, 3 · ⌈columns/2⌉).
        scales: FP32, or float8_e8m0fnu for UE8M0; their shape is the form's (``TileFormat.scale_shape``), under the
            same leading axes.
        columns: of the values.
        counts: rows of each group, for tiles over rows.
    """

    codes: Tensor
    scales: Tensor
    form: TileFormat
    columns: int
    counts: tuple[int, ...] | None = None

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code x scale, multiplied in FP32 and rounded once to ``dtype``."""
        return dequantise(self, dtype)

    def bad_tiles(self) -> int:
        """Tiles that held an infinity or a NaN."""
        return int(self.scales.float().isnan().sum())

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantise(x: Tensor, form: TileFormat, counts: Sequence[int] | None = None) -> Quantised:
    """``x`` in ``form``.

    Args:
        x: (..., rows, columns) in any floating dtype; rows of ``1x128`` tiles may have any leading axes, or none.
        counts: with ``128x1`` tiles, the rows of each group of a (rows, columns) tensor; tiles begin anew with each.

    Raises:
        ValueError: counts beside other tiles, or that do not add up to the rows; a tensor that has no such tiles.
    """
    _check(x.shape, x.dtype, form, counts)
    found = native.quantise(x, form, None, counts)
    if found is None or found.codes is None or found.scales is None:
        return _as_quantised(*reference.quantise(x, form, counts), form, x.shape[-1], counts)
    return _as_quantised(found.codes, found.scales, form, x.shape[-1], counts)


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, multiplied in FP32 (FP64 for FP64) and rounded once to ``dtype``."""
    of = quantised.codes, quantised.scales, quantised.form, quantised.columns, dtype, quantised.counts
    values = native.dequantise(*of)
    return reference.dequantise(*of) if values is None else values


def quantise_with_values(
    x: Tensor, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None
) -> tuple[Quantised, Tensor]:
    """``quantise(x, form, counts)`` and what it dequantises to, in one pass over ``x``."""
    _check(x.shape, x.dtype, form, counts)
    found = native.quantise(x, form, dtype, counts)
    if found is None or found.codes is None or found.scales is None or found.values is None:
        quantised = quantise(x, form, counts)
        return quantised, dequantise(quantised, dtype)
    return _as_quantised(found.codes, found.scales, form, x.shape[-1], counts), found.values


def round_trip(x: Tensor, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None) -> Tensor:
    """What ``x`` comes back as, without the codes in between: ``quantise(x, form, counts).values(dtype)``."""
    _check(x.shape, x.dtype, form, counts)
    found = native.quantise(x, form, dtype, counts, codes=False)
    return dequantise(quantise(x, form, counts), dtype) if found is None or found.values is None else found.values


def turn_values(
    quantised: Quantised, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None
) -> Tensor:
    """(T, I): the values of ``1x128`` tiles, quantised again in tiles over rows, as a product over rows reads them."""
    shape = *quantised.codes.shape[:-1], quantised.columns
    _check(shape, torch.float32, form, counts)
    codes, scales = quantised.codes, quantised.scales
    values = native.turn(codes, scales, quantised.form, quantised.columns, form, dtype, counts)
    return round_trip(dequantise(quantised), form, dtype, counts) if values is None else values


def _as_quantised(
    codes: Tensor, scales: Tensor, form: TileFormat, columns: int, counts: Sequence[int] | None
) -> Quantised:
    return Quantised(codes, scales, form, columns, None if counts is None else tuple(counts))


def _check(shape: Sequence[int], dtype: torch.dtype, form: TileFormat, counts: Sequence[int] | None) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"{dtype} cannot be quantised: give floating-point values")
    needed = {"tensor": 0, "1x128": 1}.get(form.tile, 2)
    if len(shape) < needed:
        raise ValueError(f"{form.tile} tiles need rows and columns, not {tuple(shape)}")
    if counts is None:
        return
    if form.tile != "128x1" or len(shape) != 2 or sum(counts) != shape[0] or min(counts, default=0) < 0:
        raise ValueError(
            f"counts: {len(counts)} groups of {sum(counts)} rows do not fit {tuple(shape)} in {form.tile} tiles; "
            "give them for 128x1 tiles of (rows, columns), none negative, adding up to the rows"
        )
