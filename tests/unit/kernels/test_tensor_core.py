"""Hopper's accumulation: every bit equal to a slow definition in exact fractions, one output at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abyssal.kernels import tensor_core
from abyssal.kernels.fp8_operands import Factor, activation, weight_rows
from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.kernels.tensor_core import promoted_product, tensor_core_product
from abyssal.spec.tile_format import TILE, CodeName, ScaleName, TileFormat, tiles_along

FIELDS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ACTIVATION, WEIGHT = TileFormat(tile="1x128"), TileFormat(tile="128x128")


def decode(byte: int, code: str) -> tuple[Fraction, int]:
    """A code's value and its exponent, from the rules of its format."""
    exponent_bits, mantissa_bits, bias = FIELDS[code]
    field, mantissa = (byte >> mantissa_bits) & (2**exponent_bits - 1), byte & (2**mantissa_bits - 1)
    exponent = max(field, 1) - bias
    significand = Fraction(mantissa, 2**mantissa_bits) + (field > 0)
    return (-1) ** (byte >> 7) * significand * Fraction(2) ** exponent, exponent


def exponent_of(value: Fraction) -> int:
    """e with 2^e <= |value| < 2^(e+1)."""
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    return exponent if abs(value) >= Fraction(2) ** exponent else exponent - 1


def instruction(register: Fraction, products: list[tuple[Fraction, int]]) -> Fraction:
    """One instruction: align, truncate, add, truncate."""
    addends = [(value, exponent) for value, exponent in products if value]
    if register:
        addends.append((register, exponent_of(register)))
    if not addends:
        return register
    unit = Fraction(2) ** (max(exponent for _, exponent in addends) - 13)
    total = sum((math.trunc(value / unit) * unit for value, _ in addends), Fraction(0))
    if not total:
        return total
    unit = Fraction(2) ** (exponent_of(total) - 13)
    return math.trunc(total / unit) * unit


def products(a: Quantised, b: Quantised, row: int, column: int, folded: bool) -> list[list[tuple[Fraction, int]]]:
    """Products and their exponents, a list a tile; with the scales, or of codes alone."""
    codes_a, codes_b = (operand.codes.view(torch.uint8).tolist() for operand in (a, b))
    scales_a, scales_b = (operand.scales.float().tolist() for operand in (a, b))
    tiles: list[list[tuple[Fraction, int]]] = [[] for _ in range(tiles_along(a.columns))]
    for k in range(a.columns):
        (x, ex), (y, ey) = decode(codes_a[row][k], a.form.code), decode(codes_b[column][k], b.form.code)
        if folded:
            scale = Fraction(scales_a[row][k // TILE]) * Fraction(scales_b[column // TILE][k // TILE])
            shift = exponent_of(scale)
            assert scale == Fraction(2) ** shift
            tiles[k // TILE].append((x * y * scale, ex + ey + shift))
        else:
            tiles[k // TILE].append((x * y, ex + ey))
    return tiles


def run(register: Fraction, addends: list[tuple[Fraction, int]]) -> Fraction:
    for start in range(0, len(addends), 32):
        register = instruction(register, addends[start : start + 32])
    return register


def slow_promoted(a: Quantised, b: Quantised, row: int, column: int) -> np.float32:
    total = np.float32(0)
    for tile, addends in enumerate(products(a, b, row, column, folded=False)):
        register = run(Fraction(0), addends)
        scale = a.scales.float().numpy()[row, tile] * b.scales.float().numpy()[column // TILE, tile]
        total = total + np.float32(float(register)) * scale
    return total


def slow_tensor_core(a: Quantised, b: Quantised, row: int, column: int) -> np.float32:
    register = Fraction(0)
    for addends in products(a, b, row, column, folded=True):
        register = run(register, addends)
    with np.errstate(over="ignore"):  # beyond FP32 is infinite, there as here
        return np.float32(float(register))


def factors(a: Quantised, b: Quantised) -> tuple[Factor, Factor]:
    return activation(a, "a"), weight_rows(b, "b")


def codes(generator: torch.Generator, shape: tuple[int, int], code: CodeName, zeros: float) -> torch.Tensor:
    """All finite codes alike, subnormal ones among them, and a share of zeros."""
    drawn = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    drawn[(drawn & 0x7F) >= (0x7F if code == "e4m3" else 0x7C)] = 0x38
    drawn[torch.rand(shape, generator=generator) < zeros] = 0
    return drawn.view(DTYPES[code])


def draw(
    seed: int,
    sizes: tuple[int, int, int],
    code_a: CodeName,
    code_b: CodeName,
    scale: ScaleName,
    spread: int,
    zeros: float,
) -> tuple[Quantised, Quantised]:
    """Operands of any codes and scales: powers of two across ``spread`` of them, or numbers of 24 bits."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, inputs = sizes

    def scales(shape: tuple[int, int]) -> torch.Tensor:
        powers = torch.randint(-spread, spread + 1, shape, generator=generator).float().exp2()
        return powers if scale == "ue8m0" else powers * (1 + torch.rand(shape, generator=generator))

    k = tiles_along(inputs)
    a = codes(generator, (rows, inputs), code_a, zeros)
    b = codes(generator, (columns, inputs), code_b, zeros)
    return (
        Quantised(a, scales((rows, k)), TileFormat(code_a, "1x128", scale), inputs),
        Quantised(b, scales((tiles_along(columns), k)), TileFormat(code_b, "128x128", scale), inputs),
    )


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.one_of(st.integers(1, 70), st.integers(120, 300)))
CODES = st.sampled_from(["e4m3", "e5m2"])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31), SIZES, CODES, CODES, st.sampled_from([0.0, 0.3, 0.95]), st.sampled_from(["ue8m0", "float32"])
)
@example(0, (2, 3, 384), "e4m3", "e5m2", 0.0, "float32")
def test_promoted_is_the_definition_in_every_bit(seed, sizes, code_a, code_b, zeros, scale):
    a, b = draw(seed, sizes, code_a, code_b, scale, 20, zeros)
    product = promoted_product(*factors(a, b))
    slow = [[slow_promoted(a, b, row, column) for column in range(sizes[1])] for row in range(sizes[0])]
    assert torch.equal(product, torch.tensor(np.array(slow)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), SIZES, CODES, CODES, st.sampled_from([0.0, 0.3, 0.95]), st.sampled_from([0, 3, 25, 60]))
@example(0, (2, 3, 384), "e4m3", "e4m3", 0.0, 60)
@example(0, (3, 4, 300), "e5m2", "e5m2", 0.95, 60)
@example(0, (1, 1, 167), "e5m2", "e4m3", 0.95, 0)
def test_without_promotion_it_is_the_definition_in_every_bit(seed, sizes, code_a, code_b, zeros, spread):
    a, b = draw(seed, sizes, code_a, code_b, "ue8m0", spread, zeros)
    product = tensor_core_product(*factors(a, b))
    slow = [[slow_tensor_core(a, b, row, column) for column in range(sizes[1])] for row in range(sizes[0])]
    assert torch.equal(product, torch.tensor(np.array(slow)))


def test_scales_that_stay_the_same_are_multiplied_in_at_the_end():
    """One FP32 scale a tensor: the register of the codes, times the scales' product in FP32."""
    a, b = draw(1, (3, 5, 290), "e4m3", "e4m3", "ue8m0", 0, 0.0)
    scale_a, scale_b = torch.tensor(0.0123), torch.tensor(3.7e-5)
    whole = [
        replace(operand, scales=scale, form=TileFormat(tile="tensor", scale="float32"))
        for operand, scale in ((a, scale_a), (b, scale_b))
    ]
    registers = tensor_core_product(*factors(a, b))  # all scales are 1
    assert torch.equal(tensor_core_product(*factors(*whole)), registers * (scale_a * scale_b))


def test_a_sum_within_a_tile_needs_no_promotion():
    a, b = draw(2, (4, 6, 128), "e4m3", "e4m3", "float32", 9, 0.1)
    assert torch.equal(tensor_core_product(*factors(a, b)), promoted_product(*factors(a, b)))


def test_scales_that_no_exponent_follows_are_refused():
    a, b = draw(3, (2, 2, 200), "e4m3", "e4m3", "float32", 9, 0.0)
    with pytest.raises(ValueError, match=r"a: \(2, 1, 200\) has FP32 scales.*promoted"):
        tensor_core_product(*factors(a, b))


def test_small_addends_are_lost_beside_large_ones():
    """2^-5 is the last bit kept beside 256; a product of 2^-6 is nothing, and thirty of them are nothing too."""
    x, y = torch.zeros(3, 32), torch.ones(1, 32)
    x[:, 0] = 256
    x[1, 1:], x[2, 1:] = 2.0**-5, 2.0**-6
    one = torch.ones(3, 1), torch.ones(1, 1)
    a = Quantised(x.to(torch.float8_e4m3fn), one[0], ACTIVATION, 32)
    b = Quantised(y.to(torch.float8_e4m3fn), one[1], WEIGHT, 32)
    assert tensor_core_product(*factors(a, b)).flatten().tolist() == [256.0, 256 + 31 * 2.0**-5, 256.0]


def test_a_nan_tile_reaches_its_row_alone():
    x, y = torch.randn(5, 300), torch.randn(7, 300)
    x[3, 200] = torch.nan
    for product in (promoted_product, tensor_core_product):
        result = product(*factors(quantise(x, ACTIVATION), quantise(y, WEIGHT)))
        assert result[3].isnan().all() and result.isnan().sum() == 7


def test_neither_tiles_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(4, (70, 90, 256), "e4m3", "e4m3", "ue8m0", 3, 0.1)
    whole = promoted_product(*factors(a, b)), tensor_core_product(*factors(a, b))
    before = torch.get_num_threads()
    monkeypatch.setattr(tensor_core, "_TILE_ROWS", 17)
    monkeypatch.setattr(tensor_core, "_TILE_COLUMNS", 32)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(promoted_product(*factors(a, b)), whole[0])
            assert torch.equal(tensor_core_product(*factors(a, b)), whole[1])
    finally:
        torch.set_num_threads(before)
