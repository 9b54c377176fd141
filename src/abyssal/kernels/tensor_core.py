"""FP8 products as Hopper's tensor cores add them up, in every bit: about 14 of them, and what is done about that.

DeepSeek found that FP8 products on Hopper keep about 14 bits, and moves partial sums to FP32 every 128 elements, four
instructions, where scales are multiplied in too [V3 section 3.3.2].  The arithmetic of one instruction is as [V3
section 3.5.2] describes it and as a model that was checked against the hardware bit by bit has it (MMA-Sim, arXiv
2511.10909):

1.  32 products are exact.  The exponent of a product is the sum of its operands' exponents (a subnormal operand has
    that of the smallest normal one); zeros have none.
2.  The products and the register are shifted right to the largest exponent among them, keeping 13 bits after the
    point, and truncated toward zero.
3.  They are added exactly, and the register is the sum, truncated toward zero to 13 bits after its leading one.

``promoted`` begins a register anew every 128 elements and adds register x (scale x scale) to a sum in FP32, in order.

``tensor_core`` keeps one register over the whole sum, as a GEMM without promotion does.  Its scales can be multiplied
in only at the end, so an operand must have one scale along the sum (one a tensor, or a sum of at most a tile).  Where
it has more they must be powers of two: they move the exponents of its values, bit for bit, and the register's exponent
has no limit.  Other scales are refused: there is no such computation.

Every step is exact in the floating-point numbers used here, so results do not depend on threads or devices.  The loop
over the sum works on a tile of outputs that stays in the cache, and takes some thirty times as long as a product in
FP32 (``benchmarks/fp8_operators.py`` measures it).  The trade-off not taken: (rows, columns, 32) products at once,
which go through memory.

Legend: M rows of a, N rows of b, K summed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.kernels.fp8_operands import Factor
from abyssal.spec.tile_format import CODES, TILE

CHUNK = 32
"""Products that an instruction adds up at once."""
FRACTION_BITS = 13
"""Kept after the point, of addends and of the register."""
_TILE_ROWS, _TILE_COLUMNS = 256, 512
"""Outputs at a time: a few arrays of them stay in a processor's cache, and calls are few."""
_NO_EXPONENT = {torch.int8: -63, torch.int16: -8000}
"""Of a zero: so small that a sum with any other is below every product's, and does not overflow."""
_LARGEST_SPREAD = 60
"""Of exponents of scales, of both operands together, for which FP32 holds everything exactly."""


@dataclass(frozen=True)
class _Side:
    """An operand with the sum along its first axis: values and exponents (K, rows), K a multiple of 128."""

    values: Tensor
    exponents: Tensor

    def tile(self, start: int, size: int) -> _Side:
        columns = slice(start, start + size)
        return _Side(self.values[:, columns].contiguous(), self.exponents[:, columns].contiguous())


def promoted_product(a: Factor, b: Factor) -> Tensor:
    """(M, N) in FP32: tensor-core registers moved to FP32 every 128 elements."""
    sides = _unscaled(a), _unscaled(b)
    scales_a, scales_b = a.scales_RSk.flatten(1), b.scales_RSk.flatten(1)
    total_MN = torch.zeros(a.rows, b.rows, device=a.codes_RSK.device)
    for rows, columns, side_a, side_b in _tiles(*sides):
        total = total_MN[rows, columns]
        for block in range(scales_a.shape[1]):
            register = _accumulate(side_a, side_b, range(block * TILE, (block + 1) * TILE))
            total += register * (scales_a[rows, block].unsqueeze(1) * scales_b[columns, block])
    return total_MN


def tensor_core_product(a: Factor, b: Factor) -> Tensor:
    """(M, N) in FP32: one tensor-core register over the whole sum.

    Raises:
        ValueError: scales along the sum that are several and no powers of two.
    """
    (side_a, after_a, spread_a), (side_b, after_b, spread_b) = _folded(a, "a"), _folded(b, "b")
    if spread_a + spread_b > _LARGEST_SPREAD:
        side_a, side_b = (_Side(side.values.double(), side.exponents) for side in (side_a, side_b))
    after_MN = after_a.unsqueeze(1) * after_b
    if a.uniform and b.uniform:
        after_MN = after_MN.float()  # as promotion multiplies them
    product_MN = torch.empty(a.rows, b.rows, device=a.codes_RSK.device)
    for rows, columns, tile_a, tile_b in _tiles(side_a, side_b):
        register = _accumulate(tile_a, tile_b, range(len(side_a.values)))
        product_MN[rows, columns] = (register * after_MN[rows, columns]).float()
    return product_MN


def _unscaled(factor: Factor, dtype: torch.dtype = torch.int8) -> _Side:
    """Codes alone, ragged tiles filled up with zeros."""
    code = CODES["e4m3" if factor.codes_RSK.dtype is torch.float8_e4m3fn else "e5m2"]
    codes = factor.codes_RSK.view(torch.uint8)
    field = (codes.to(torch.int16) >> code.mantissa_bits) & (2**code.exponent_bits - 1)
    exponents = field.clamp(min=1) - (2 ** (code.exponent_bits - 1) - 1)
    exponents = exponents.masked_fill((codes & 0x7F) == 0, _NO_EXPONENT[dtype]).to(dtype)
    return _Side(_along_sum(factor.codes_RSK.float(), 0.0), _along_sum(exponents, _NO_EXPONENT[dtype]))


def _folded(factor: Factor, name: str) -> tuple[_Side, Tensor, int]:
    """The operand with the scales that change along its sum folded in, what remains for the end (FP64, a row), and how
    many powers of two the folded scales span.

    They are folded in relative to the largest of the row, so that values stay near one.
    """
    scales_Rk = factor.scales_RSk.flatten(1)
    if factor.uniform:
        return _unscaled(factor, torch.int16), scales_Rk[:, 0].double(), 0
    if not factor.powers_of_two:
        raise ValueError(
            f"{name}: {tuple(factor.codes_RSK.shape)} has FP32 scales that change along the sum; tensor_core can only "
            "follow powers of two: take ue8m0 scales, one scale a tensor, or promoted"
        )
    bare = _unscaled(factor, torch.int16)
    powers_Rk = scales_Rk.frexp().exponent.masked_fill(scales_Rk.isnan(), 0)
    largest_R = powers_Rk.amax(1)
    relative_Rk = powers_Rk - largest_R.unsqueeze(1)
    shifts = relative_Rk.t().repeat_interleave(TILE, 0)
    exponents = torch.where(bare.exponents == _NO_EXPONENT[torch.int16], bare.exponents, bare.exponents + shifts)
    spread = -int(relative_Rk.amin()) if relative_Rk.numel() else 0
    dtype = torch.float64 if spread > _LARGEST_SPREAD else torch.float32
    values = bare.values.to(dtype) * _power_of_two(shifts, dtype)
    after_R = _power_of_two(largest_R - 1, torch.float64)  # frexp's mantissa is a half
    return _Side(values, exponents.to(torch.int16)), after_R, spread


def _along_sum(padded_RSK: Tensor, filling: float) -> Tensor:
    """(R, S, K) as (S·k·128, R)."""
    padded = functional.pad(padded_RSK, (0, -padded_RSK.shape[2] % TILE), value=filling)
    return padded.flatten(1).t().contiguous()


def _tiles(a: _Side, b: _Side) -> Iterator[tuple[slice, slice, _Side, _Side]]:
    """Tiles of outputs: their rows and columns, and the operands that make them."""
    rows, columns = a.values.shape[1], b.values.shape[1]
    for left in range(0, columns, _TILE_COLUMNS):
        side_b = b.tile(left, _TILE_COLUMNS)
        for top in range(0, rows, _TILE_ROWS):
            side_a = a.tile(top, _TILE_ROWS)
            yield slice(top, top + _TILE_ROWS), slice(left, left + _TILE_COLUMNS), side_a, side_b


def _accumulate(a: _Side, b: _Side, summed: range) -> Tensor:
    """The register (M, N) after the instructions over ``summed``."""
    register = a.values.new_zeros(a.values.shape[1], b.values.shape[1])
    product, fraction = torch.empty_like(register), torch.empty_like(register)
    exponent = torch.empty(register.shape, dtype=a.exponents.dtype, device=register.device)
    for start in range(summed.start, summed.stop, CHUNK):
        chunk = slice(start, min(start + CHUNK, summed.stop))
        largest = torch.maximum(_largest_exponent(a, b, chunk, exponent), _exponent(register))
        up = _power_of_two(FRACTION_BITS - largest, register.dtype)
        _to_integers(register.mul_(up), fraction)
        for a_M, b_N in zip(a.values[chunk], b.values[chunk], strict=True):
            torch.mul(up, a_M.unsqueeze(1), out=product)
            register.add_(_to_integers(product.mul_(b_N), fraction))  # below 2^21: their sum is exact
        register.mul_(_power_of_two(largest - FRACTION_BITS, register.dtype))
        _truncate(register)
    return register


def _to_integers(values: Tensor, scratch: Tensor) -> Tensor:
    """``values`` truncated toward zero, in place; torch's own ``trunc`` is ten times slower on CPU."""
    return values.sub_(torch.frac(values, out=scratch))


def _largest_exponent(a: _Side, b: _Side, chunk: slice, scratch: Tensor) -> Tensor:
    """(M, N): of the products of a chunk."""
    found: Tensor | None = None
    for a_M, b_N in zip(a.exponents[chunk], b.exponents[chunk], strict=True):
        if found is None:
            found = a_M.unsqueeze(1) + b_N
        else:
            torch.maximum(found, torch.add(a_M.unsqueeze(1), b_N, out=scratch), out=found)
    assert found is not None
    # A chunk of zero products has no exponent.  Any below every product's will do (-88 in FP32: two of E5M2's smallest
    # and the spread of scales), for which the largest factor shifted up is still finite, as it meets a zero.
    return found.to(torch.int32).clamp_(min=-90 if a.values.dtype is torch.float32 else -900)


def _exponent(register: Tensor) -> Tensor:
    """Of normal numbers; least of all for zero."""
    if register.dtype is torch.float32:
        return ((register.view(torch.int32) >> 23) & 0xFF) - 127
    return (((register.view(torch.int64) >> 52) & 0x7FF) - 1023).to(torch.int32)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is torch.float32:
        return ((exponent + 127) << 23).view(dtype)
    return ((exponent.to(torch.int64) + 1023) << 52).view(dtype)


def _truncate(register: Tensor) -> None:
    """To 13 bits after the leading one, toward zero, in place."""
    if register.dtype is torch.float32:
        register.view(torch.int32).bitwise_and_(-(1 << (23 - FRACTION_BITS)))
    else:
        register.view(torch.int64).bitwise_and_(-(1 << (52 - FRACTION_BITS)))
