"""Tensors quantised tile by tile: codes, scales, and back [V3 section 3.3.2, figure 7].

The functions here define what the bytes are on every machine; the formats are those of
:mod:`~abyssal.spec.tile_format`.  A scale is amax / largest code, at least 2^-126, in FP32, then rounded up to a power
of two for UE8M0; 1 for a tile of zeros.  A code is value / scale, clamped to the finite codes and rounded to nearest,
ties to even.  A tile with an infinity or a NaN has a NaN as its scale and one NaN code throughout, so that it comes
back as NaN and spoils what it is multiplied into, where the trainer's guard sees it.

Error bound.  For finite x in a tile of scale s, m mantissa bits and smallest normal code 2^e:
|dequantised - x| <= max(2^-(m+1) |x|, 2^(e-m-1) s) (1 + 2^-18); and a cast to BF16 adds 2^-8 relative where the scale
is no power of two, nothing where it is (E4M3 and E5M2; E5M6 has seven significant bits, which BF16 keeps too).

Legend: T rows, I columns, ``_Ti`` scales by row and tile of columns, ``_tI`` by tile of rows and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.spec.tile_format import CODES, TILE, TileFormat

SMALLEST_SCALE = 2.0**-126
"""The smallest normal FP32 number; a smaller scale would divide by zero or by a subnormal."""
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_NAN_E5M6 = 0x7E0


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
        ValueError: counts beside other tiles, or that do not add up to the rows.
    """
    _check_counts(x, form, counts)
    wide = x.float()
    amax = _amax(wide, form, counts)
    scales = _scales(amax, form)
    spread = _spread(scales, form, x.shape, counts)
    scaled = (wide / spread).clamp(-form.largest, form.largest)
    stored = scales.to(torch.float8_e8m0fnu) if form.scale == "ue8m0" else scales
    return Quantised(_encode(scaled, form), stored, form, x.shape[-1], None if counts is None else tuple(counts))


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale, multiplied in FP32 and rounded once to ``dtype``."""
    values = _decode(quantised.codes, quantised.form, quantised.columns)
    scales = quantised.scales.float()
    return (values * _spread(scales, quantised.form, values.shape, quantised.counts)).to(dtype)


def quantise_with_values(
    x: Tensor, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None
) -> tuple[Quantised, Tensor]:
    """``quantise(x, form, counts)`` and what it dequantises to, in one pass over ``x``."""
    quantised = quantise(x, form, counts)
    return quantised, quantised.values(dtype)


def round_trip(x: Tensor, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None) -> Tensor:
    """What ``x`` comes back as, without the codes in between: ``quantise(x, form, counts).values(dtype)``."""
    return quantise(x, form, counts).values(dtype)


def turn_values(
    quantised: Quantised, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None = None
) -> Tensor:
    """(T, I): the values of ``1x128`` tiles, quantised again in tiles over rows, as a product over rows reads them."""
    return round_trip(quantised.values(), form, dtype, counts)


def _check_counts(x: Tensor, form: TileFormat, counts: Sequence[int] | None) -> None:
    if counts is None:
        return
    if form.tile != "128x1" or x.ndim != 2 or sum(counts) != len(x):
        raise ValueError(
            f"counts: {len(counts)} groups of {sum(counts)} rows do not fit {tuple(x.shape)} in {form.tile} tiles; "
            "give them for 128x1 tiles of (rows, columns), adding up to the rows"
        )


def _amax(x: Tensor, form: TileFormat, counts: Sequence[int] | None) -> Tensor:
    """The largest magnitude of each tile; NaN and infinity win."""
    if form.tile == "tensor":
        return x.abs().amax() if x.numel() else x.new_zeros(())
    if form.tile == "1x128":
        return functional.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE)).abs().amax(-1)
    if form.tile == "128x128":
        padded = functional.pad(x, (0, -x.shape[-1] % TILE, 0, -x.shape[-2] % TILE))
        return padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).abs().amax((-3, -1))
    parts = [x] if counts is None else x.split([*counts, 0])  # one of no rows, so that there is something to join
    found = [
        functional.pad(part, (0, 0, 0, -part.shape[-2] % TILE)).unflatten(-2, (-1, TILE)).abs().amax(-2)
        for part in parts
    ]
    return torch.cat(found, -2)


def _scales(amax: Tensor, form: TileFormat) -> Tensor:
    scales = (amax / form.largest).clamp(min=SMALLEST_SCALE)
    if form.scale == "ue8m0":
        mantissa, exponent = torch.frexp(scales)  # scale = mantissa x 2^exponent, mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    scales = torch.where(amax == 0, torch.ones_like(scales), scales)
    return torch.where(torch.isfinite(amax), scales, torch.nan)


def _spread(scales: Tensor, form: TileFormat, shape: Sequence[int], counts: Sequence[int] | None) -> Tensor:
    """Each value's scale, broadcastable over the values."""
    if form.tile == "tensor":
        return scales
    if form.tile in ("1x128", "128x128"):
        scales = scales.repeat_interleave(TILE, -1)[..., : shape[-1]]
    if form.tile == "128x128":
        scales = scales.repeat_interleave(TILE, -2)[..., : shape[-2], :]
    if form.tile == "128x1":
        groups = [shape[-2]] if counts is None else counts
        rows = [min(TILE, count - start) for count in groups for start in range(0, count, TILE)]
        scales = scales.repeat_interleave(torch.tensor(rows, dtype=torch.int64, device=scales.device), -2)
    return scales


def _encode(scaled: Tensor, form: TileFormat) -> Tensor:
    """Codes of values within the finite range, and the positive NaN for NaN."""
    scaled = torch.where(scaled.isnan(), torch.nan, scaled)
    if form.code in _DTYPES:
        return scaled.to(_DTYPES[form.code])
    # E5M6 is FP16 less four bits of the mantissa.  A cast to FP16 first would round twice, so FP32 is rounded to units
    # of E5M6's last place, which FP16 holds exactly.
    magnitude = scaled.abs()
    exponent = torch.frexp(magnitude.clamp(min=2.0**-14)).exponent  # 2^(exponent - 1) <= magnitude
    unit = torch.ldexp(torch.ones_like(magnitude), exponent - 1 - CODES["e5m6"].mantissa_bits)
    rounded = torch.copysign((magnitude / unit).round() * unit, scaled)
    codes = (rounded.to(torch.float16).view(torch.int16).to(torch.int32) >> 4) & 0xFFF
    codes = torch.where(scaled.isnan(), _NAN_E5M6, codes)
    pairs = functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    packed = torch.stack([first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4], -1)
    return packed.flatten(-2).to(torch.uint8)


def _decode(codes: Tensor, form: TileFormat, columns: int) -> Tensor:
    """FP32 values of codes."""
    if form.code in _DTYPES:
        return codes.float()
    packed = codes.to(torch.int32).unflatten(-1, (-1, 3))
    first = packed[..., 0] | ((packed[..., 1] & 0xF) << 8)
    second = (packed[..., 1] >> 4) | (packed[..., 2] << 4)
    pairs = torch.stack([first, second], -1).flatten(-2)[..., :columns]
    return ((pairs << 4).to(torch.int16)).view(torch.float16).float()
