"""What the bytes of quantised tiles are, in plain PyTorch: the definition in :mod:`~abyssal.kernels.fp8_tiles`.

Legend: T rows, I columns, ``_Ti`` scales by row and tile of columns, ``_tI`` by tile of rows and column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.spec.tile_format import CODES, TILE, TileFormat

SMALLEST_SCALE = 2.0**-126
"""The smallest normal FP32 number; a smaller scale would divide by zero or by a subnormal."""
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_NAN_E5M6 = 0x7E0


@torch.no_grad()
def quantise(x: Tensor, form: TileFormat, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    wide = x.float()
    scales = tile_scales(_amax(wide, form, counts), form)
    codes = encode(wide / _spread(scales, form, x.shape, counts), form)
    return codes, scales.to(torch.float8_e8m0fnu) if form.scale == "ue8m0" else scales


@torch.no_grad()
def dequantise(
    codes: Tensor,
    scales: Tensor,
    form: TileFormat,
    columns: int,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """code x scale, multiplied in FP32 (FP64 for FP64) and rounded once to ``dtype``."""
    working = torch.float64 if dtype is torch.float64 else torch.float32
    values = decode(codes, form, columns).to(working)
    return (values * _spread(scales.to(working), form, values.shape, counts)).to(dtype)


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


def tile_scales(amax: Tensor, form: TileFormat) -> Tensor:
    """FP32 scales of tiles with these largest magnitudes."""
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


def encode(scaled: Tensor, form: TileFormat) -> Tensor:
    """The nearest finite codes, ties to even; a positive NaN for any NaN."""
    scaled = torch.where(scaled.isnan(), torch.nan, scaled).clamp(-form.largest, form.largest)
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


def decode(codes: Tensor, form: TileFormat, columns: int) -> Tensor:
    """FP32 values of codes."""
    if form.code in _DTYPES:
        return codes.float()
    packed = codes.to(torch.int32).unflatten(-1, (-1, 3))
    first = packed[..., 0] | ((packed[..., 1] & 0xF) << 8)
    second = (packed[..., 1] >> 4) | (packed[..., 2] << 4)
    pairs = torch.stack([first, second], -1).flatten(-2)[..., :columns]
    return ((pairs << 4).to(torch.int16)).view(torch.float16).float()
