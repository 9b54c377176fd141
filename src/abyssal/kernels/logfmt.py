"""LogFMT-nBit, a logarithmic format for combine that adapts to each tile: an experiment [ISCA section 3.2].

The logarithms of a tile's magnitudes lie more evenly than the magnitudes do, so n - 1 bits number evenly spaced
logarithms between the tile's smallest and largest: code 0 is zero, 1 the smallest, 2^(n-1) - 1 the largest, and

    value = sign · exp(low + step · (code - 1)),    step = (high - low) / (2^(n-1) - 2).

Two rules of the paper keep training well.  A value goes to the nearest level *in linear space*: nearest logarithms
would err upwards on average.  And low is at least high - log 2^32, the range of a floating-point format with five
exponent bits, so that one tiny value does not coarsen its tile; what is smaller goes to the lowest level or to zero,
whichever is nearer.  Codes are exchanged in place of BF16 on combine; no product is computed in them, and DeepSeek
dropped the format for what logarithms and exponentials cost next to communication.

Error bound.  For finite x: |decoded - x| <= max(tanh(step / 2) |x|, exp(low) / 2) + 2^-15 |x| + 2^-149, where the
second term of the maximum is for magnitudes under exp(low) alone, and the last two are FP32's in the exponential.
With eight bits step is at most 0.176, so tanh(step / 2) is at most 8.8 %; where a tile's magnitudes span e^6 it is
2.4 %, and E4M3 has 6.25 %.  A tile with an infinity or a NaN comes back as NaN throughout, as from
:mod:`~abyssal.kernels.fp8_tiles`.

Legend: T rows, I columns, ``_Ti`` by row and tile of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.spec.tile_format import TILE, tiles_along

LARGEST_RANGE = 32 * math.log(2)
"""Of a tile's logarithms, from the lowest level to the highest."""
LEAST_BITS, MOST_BITS = 3, 15


@dataclass(frozen=True)
class LogTiles:
    """A tensor in LogFMT, by tiles of 1 x 128.

    Attributes:
        codes_TI: sign in the highest of ``bits`` bits, level below; uint8 up to eight bits, else int16, not packed.
        low_Ti: FP32 logarithm of the lowest level; NaN for a tile with an infinity or a NaN.
        step_Ti: FP32 distance of two levels.
    """

    codes_TI: Tensor
    low_Ti: Tensor
    step_Ti: Tensor
    bits: int

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, computed in FP32 and rounded once to ``dtype``."""
        codes_TI = self.codes_TI.to(torch.int32)
        level_TI, negative_TI = codes_TI & _mask(self.bits), codes_TI > _mask(self.bits)
        low_TI, step_TI = _spread(self.low_Ti, level_TI), _spread(self.step_Ti, level_TI)
        magnitude_TI = torch.where(level_TI == 0, low_TI * 0, _exp(low_TI, step_TI, level_TI))  # NaN * 0 is NaN
        return torch.where(negative_TI, -magnitude_TI, magnitude_TI).to(dtype)


def bytes_per_token(columns: int, bits: int = 8) -> float:
    """Codes, packed, and two FP32 numbers a tile."""
    return columns * bits / 8 + 8 * tiles_along(columns)


def encode_log(x_TI: Tensor, bits: int = 8, rounding: Literal["linear", "log"] = "linear") -> LogTiles:
    """``x_TI`` in LogFMT of ``bits`` bits.

    Args:
        x_TI: (..., columns) in any floating dtype; the last tile may be ragged.
        rounding: to the nearest level, or to the nearest logarithm, which is there to show that it is biased.

    Raises:
        ValueError: a number of bits or a rounding that there is not.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits is {bits}: give {LEAST_BITS} to {MOST_BITS}, of which one is the sign")
    if rounding not in ("linear", "log"):
        raise ValueError(f"rounding is {rounding!r}: choose linear or log")
    wide_TI = x_TI.float()
    log_TI = wide_TI.abs().log()  # of zero: -inf
    low_Ti, step_Ti = _levels(log_TI, wide_TI, bits)
    low_TI, step_TI = _spread(low_Ti, log_TI), _spread(step_Ti, log_TI)
    place_TI = torch.where(step_TI > 0, (log_TI - low_TI) / step_TI, 0.0)  # levels above the lowest
    if rounding == "log":
        level_TI = torch.where(place_TI < -0.5, 0.0, place_TI.round() + 1)
    else:
        # The two levels around, told apart by their middle: a floor that is one off, by rounding, is put right by it.
        below_TI = place_TI.floor().clamp(0, _mask(bits) - 1) + 1
        middle_TI = _exp(low_TI, step_TI, below_TI) / 2 + _exp(low_TI, step_TI, below_TI + 1) / 2
        level_TI = below_TI + (wide_TI.abs() > middle_TI)
        level_TI = torch.where(wide_TI.abs() < low_TI.exp() / 2, 0.0, level_TI)
    level_TI = torch.where(wide_TI == 0, 0.0, level_TI.clamp(0, _mask(bits)))
    level_TI = level_TI.nan_to_num(1.0).to(torch.int16) + torch.signbit(wide_TI) * (1 << bits - 1)
    return LogTiles(level_TI.to(torch.uint8 if bits <= 8 else torch.int16), low_Ti, step_Ti, bits)


def _mask(bits: int) -> int:
    """The highest level, and the bits that hold one."""
    return (1 << bits - 1) - 1


def _levels(log_TI: Tensor, wide_TI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Lowest level and step of each tile; 0 and 0 for one of zeros."""
    padding = (0, -log_TI.shape[-1] % TILE)
    tiles = functional.pad(log_TI, padding, value=-torch.inf).unflatten(-1, (-1, TILE))
    high_Ti = tiles.amax(-1)
    least_Ti = torch.where(tiles == -torch.inf, torch.inf, tiles).amin(-1)
    low_Ti = torch.maximum(least_Ti, high_Ti - LARGEST_RANGE)
    step_Ti = (high_Ti - low_Ti) / (_mask(bits) - 1)
    zeros_Ti = high_Ti == -torch.inf
    finite_Ti = functional.pad(wide_TI, padding).unflatten(-1, (-1, TILE)).isfinite().all(-1)
    low_Ti = torch.where(finite_Ti, torch.where(zeros_Ti, 0.0, low_Ti), torch.nan)
    return low_Ti, torch.where(zeros_Ti | ~finite_Ti, 0.0, step_Ti)


def _spread(by_tile_Ti: Tensor, like_TI: Tensor) -> Tensor:
    return by_tile_Ti.repeat_interleave(TILE, -1)[..., : like_TI.shape[-1]]


def _exp(low_TI: Tensor, step_TI: Tensor, level_TI: Tensor) -> Tensor:
    """The magnitude of a level, kept finite: exp(log x) may pass the largest number by a rounding."""
    return (low_TI + step_TI * (level_TI - 1)).exp().clamp(max=torch.finfo(torch.float32).max)
