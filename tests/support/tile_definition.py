"""Quantised tiles from the rules of their formats alone: whole numbers and fractions, one value at a time.

A second way to the bytes of ``kernels/fp8_tiles.py`` that shares nothing with it: every code of a format is enumerated
by its sign, exponent and mantissa, and the nearest is looked up.  IEEE's two roundings to FP32 (of a scale, and of a
value over its scale) are made of fractions too.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from abyssal.spec.tile_format import CodeName, TileFormat

EDGE = 128
_WIDTHS: dict[CodeName, tuple[int, int]] = {"e4m3": (4, 3), "e5m2": (5, 2), "e5m6": (5, 6)}
_NAN: dict[CodeName, int] = {"e4m3": 0x7F, "e5m2": 0x7F, "e5m6": 0x7E0}


@cache
def magnitudes(code: CodeName) -> list[Fraction]:
    """The finite numbers from zero up; the place of each in the list is its code."""
    exponent_bits, mantissa_bits = _WIDTHS[code]
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            all_ones = exponent == 2**exponent_bits - 1
            if all_ones and (code != "e4m3" or mantissa == 2**mantissa_bits - 1):
                break  # infinities and NaN
            fraction = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
            found.append(fraction * Fraction(2) ** (max(exponent, 1) - bias))
    return found


def nearest(value: Fraction, code: CodeName) -> int:
    """The code nearest to a magnitude, an even one of two; the largest for all beyond it."""
    known = magnitudes(code)
    below = bisect_right(known, value) - 1
    if below == len(known) - 1:
        return below
    to_below, to_above = value - known[below], known[below + 1] - value
    return below + (to_above < to_below or (to_above == to_below and below % 2 == 1))


def rounded(value: Fraction, significant: int = 24) -> Fraction:
    """The nearest number of so many significant bits and the exponents of FP32, an even one of two."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - significant + 1)
    return round(value / unit) * unit


def scale_of(amax: Fraction, form: TileFormat) -> Fraction:
    if amax == 0:
        return Fraction(1)
    scale = max(rounded(amax / magnitudes(form.code)[-1]), Fraction(2) ** -126)
    if form.scale == "float32":
        return scale
    exponent = -126
    while Fraction(2) ** exponent < scale:
        exponent += 1
    return Fraction(2) ** exponent


def tiles(rows: int, columns: int, form: TileFormat, counts: Sequence[int] | None) -> Iterator[list[tuple[int, int]]]:
    """The places (row, column) of each tile, in the order of their scales."""
    if form.tile == "tensor":  # one scale, though there be no values
        yield [(i, j) for i in range(rows) for j in range(columns)]
        return
    height, width = {"1x128": (1, EDGE), "128x1": (EDGE, 1)}.get(form.tile, (EDGE, EDGE))
    first = 0
    for count in [rows] if counts is None else counts:
        for top in range(0, count, height):
            for left in range(0, columns, width):
                ends = min(top + height, count), min(left + width, columns)
                yield [(first + i, j) for i in range(top, ends[0]) for j in range(left, ends[1])]
        first += count


def quantised(
    x: Tensor, form: TileFormat, counts: Sequence[int] | None = None
) -> tuple[list[list[int]], list[Fraction | None], list[list[Fraction | None]]]:
    """Codes with their signs, scales (None is NaN), and exact values code x scale, of (rows, columns)."""
    wide = x.double().tolist()
    negative = torch.signbit(x).tolist()
    sign_bit = 1 << sum(_WIDTHS[form.code])
    codes = [[0] * x.shape[1] for _ in range(x.shape[0])]
    values: list[list[Fraction | None]] = [[None] * x.shape[1] for _ in range(x.shape[0])]
    scales: list[Fraction | None] = []
    for places in tiles(x.shape[0], x.shape[1], form, counts):
        if not all(math.isfinite(wide[i][j]) for i, j in places):
            scales.append(None)
            for i, j in places:
                codes[i][j] = _NAN[form.code]
            continue
        scale = scale_of(max((abs(Fraction(wide[i][j])) for i, j in places), default=Fraction()), form)
        scales.append(scale)
        for i, j in places:
            found = nearest(rounded(abs(Fraction(wide[i][j])) / scale), form.code)
            sign = -1 if negative[i][j] else 1
            codes[i][j] = found + (sign_bit if negative[i][j] else 0)
            values[i][j] = sign * magnitudes(form.code)[found] * scale
    return codes, scales, values


def packed(codes: list[list[int]], code: CodeName) -> list[list[int]]:
    """Bytes as they are stored: in E5M6 two codes are 24 bits, the lowest first, a missing one zero."""
    if code != "e5m6":
        return codes
    found = []
    for line in codes:
        pairs = [first | second << 12 for first, second in zip(line[::2], [*line[1::2], 0], strict=False)]
        found.append([byte for pair in pairs for byte in pair.to_bytes(3, "little")])
    return found
