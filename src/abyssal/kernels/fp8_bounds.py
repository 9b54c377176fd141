"""How far a block-scaled FP8 product may be from the exact one, for each way of adding up.

The exact product is that of the values, code x scale, in real numbers.  u = 2^-24 is FP32's unit roundoff and |A||B|
the sum of magnitudes of the products.

FP32, in any order and by blocks or not: n u / (1 - n u) |A||B| with n = K + k + 4 (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1): the products within a tile, the tiles, and four roundings of scales and values.

Tensor cores: an instruction that adds up c products at a register truncates c + 1 addends by less than 2^(e-13) each, e
the largest exponent among them, and the sum by less than 2^-13 of itself.  2^e is at most the largest of the products'
powers of two and of the magnitudes summed so far, since truncation toward zero makes nothing larger.  Errors of
instructions add up.  What is promoted adds FP32's error for the tiles.

Each is then rounded once to the result's dtype; and FP32 has a smallest number.  Results beyond FP32's largest are not
covered: they are infinite.

Legend: M rows of a, N rows of b, K summed over, ``k`` its tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.fp8_gemm import Summation
from abyssal.kernels.fp8_operands import Factor
from abyssal.kernels.tensor_core import CHUNK, FRACTION_BITS
from abyssal.spec.tile_format import TILE

_SMALLEST_EXPONENT = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}


def error_bound(a: Factor, b: Factor, out_dtype: torch.dtype, summation: Summation) -> Tensor:
    """(M, N) in FP64: the largest distance of the result from the exact product."""
    codes_a, scales_a = a.blocks(torch.float64)
    codes_b, scales_b = b.blocks(torch.float64)
    values_a, values_b = codes_a * scales_a.unsqueeze(2), codes_b * scales_b.unsqueeze(2)
    sums_MN = torch.einsum("bmk,bnk->mn", values_a.abs(), values_b.abs())
    powers_a, powers_b = _powers(codes_a, a), _powers(codes_b, b)
    if summation == "tensor_core":
        sides = (values_a, values_b, powers_a * scales_a.unsqueeze(2), powers_b * scales_b.unsqueeze(2))
        summed_MN = _registers(*(torch.cat(list(side), 1) for side in sides))
        summed_MN += _float32(3) * (sums_MN + summed_MN)
    elif summation == "promoted":
        registers = [
            _registers(*sides) * scale_a.unsqueeze(1) * scale_b
            for *sides, scale_a, scale_b in zip(codes_a, codes_b, powers_a, powers_b, scales_a, scales_b, strict=True)
        ]
        summed_MN = sum(registers, torch.zeros_like(sums_MN))
        summed_MN += _float32(len(codes_a) + 3) * (sums_MN + summed_MN)
    else:
        exact = 2.0**-29 if summation == "float64" else 1.0
        summed_MN = _float32(len(codes_a) * (TILE + 1) + 4) * exact * sums_MN
    smallest = torch.finfo(torch.float32).tiny * (a.summed + 1)
    lost_MN = 2.0**-133 * (values_a.abs().sum((0, 2)).unsqueeze(1) + values_b.abs().sum((0, 2)))
    rounded_MN = torch.finfo(out_dtype).eps / 2 * (sums_MN + summed_MN)
    return summed_MN + rounded_MN + smallest + lost_MN


def _float32(roundings: int) -> float:
    unit = torch.finfo(torch.float32).eps / 2
    return roundings * unit / (1 - roundings * unit)


def _powers(codes: Tensor, factor: Factor) -> Tensor:
    """2^exponent of each code; zero for a zero."""
    exponents = (codes.frexp().exponent - 1).clamp(min=_SMALLEST_EXPONENT[factor.codes_RSK.dtype])
    return torch.where(codes == 0, 0.0, exponents.double().exp2())


def _registers(values_MK: Tensor, values_NK: Tensor, powers_MK: Tensor, powers_NK: Tensor) -> Tensor:
    """(M, N): the error of a register that the sum goes through."""
    total_MN = values_MK.new_zeros(len(values_MK), len(values_NK))
    before_MN = torch.zeros_like(total_MN)
    for start in range(0, values_MK.shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        largest_MN = (powers_MK[:, None, chunk] * powers_NK[None, :, chunk]).amax(2)
        after_MN = before_MN + values_MK[:, chunk].abs() @ values_NK[:, chunk].abs().t()
        total_MN += 2.0**-FRACTION_BITS * ((CHUNK + 1) * torch.maximum(largest_MN, before_MN) + after_MN)
        before_MN = after_MN
    return total_MN
