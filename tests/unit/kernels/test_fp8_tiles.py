"""Quantised tiles beside a slow definition made of fractions: every byte, for any shape and any value."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, dequantise, quantise, quantise_with_values, round_trip, turn_values
from abyssal.spec.tile_format import CODES, TileFormat
from tests.support import tile_definition as slow
from tests.support.tile_values import FORMATS, bits, draw, matrices

FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
DEFINED = st.one_of(
    matrices(st.integers(0, 3), st.sampled_from([0, 1, 127, 128, 129, 150])),
    matrices(st.sampled_from([1, 127, 128, 129, 150]), st.integers(0, 3)),
)


def scale_bits(scales: list[Fraction | None], form: TileFormat, shape: tuple[int, ...]) -> Tensor:
    if form.scale == "float32":
        return bits(torch.tensor([float("nan") if scale is None else float(scale) for scale in scales]).view(shape))
    bytes_ = [255 if scale is None else 127 + exponent(scale) for scale in scales]
    return torch.tensor(bytes_, dtype=torch.uint8).view(shape)


def exponent(power: Fraction) -> int:
    found = power.numerator.bit_length() - power.denominator.bit_length()
    assert Fraction(2) ** found == power
    return found


def assert_defined(found: Quantised, x: Tensor, form: TileFormat) -> None:
    """Codes, scales and values are those of the slow definition."""
    codes, scales, values = slow.quantised(x, form, found.counts)
    stored = torch.tensor(slow.packed(codes, form.code), dtype=torch.uint8).view(len(x), form.code_columns(x.shape[1]))
    assert torch.equal(bits(found.codes), stored)
    shape = form.scale_shape(x.shape[0], x.shape[1], found.counts)
    assert found.scales.shape == shape and torch.equal(bits(found.scales), scale_bits(scales, form, shape))
    for dtype, significant in ((torch.float32, 24), (torch.bfloat16, 8)):
        expected = [[as_float(value, significant) for value in line] for line in values]
        actual = found.values(dtype)
        assert actual.dtype is dtype
        torch.testing.assert_close(
            actual.double(), torch.tensor(expected).double().view(x.shape), rtol=0, atol=0, equal_nan=True
        )


def as_float(value: Fraction | None, significant: int) -> float:
    """Rounded to FP32 and from there to ``significant`` bits; infinity beyond the largest exponent."""
    if value is None:
        return float("nan")
    sign = -1 if value < 0 else 1
    found = slow.rounded(slow.rounded(abs(value)), significant)
    return sign * (float(found) if found < 2**128 else float("inf"))


@settings(max_examples=40, deadline=None)
@given(DEFINED, FORMATS, FLOATS)
def test_every_byte_is_that_of_the_definition(x: Tensor, form: TileFormat, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    assert_defined(quantise(x, form), x, form)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.sampled_from([0, 1, 2, 127, 128, 130]), max_size=4), FORMATS)
@example(0, [], TileFormat(tile="128x1"))
@example(0, [0, 0], TileFormat(tile="128x1"))
@example(0, [0, 129, 0], TileFormat(tile="128x1"))
def test_tiles_over_rows_begin_anew_with_each_group(seed: int, counts: list[int], form: TileFormat) -> None:
    form = TileFormat(form.code, "128x1", form.scale)
    x = draw(seed, sum(counts), 2)
    found = quantise(x, form, counts)
    assert_defined(found, x, form)
    alone = [quantise(part, form) for part in x.split(counts) if counts]
    if alone:
        assert torch.equal(bits(found.codes), torch.cat([bits(part.codes) for part in alone]))
        assert torch.equal(bits(found.scales), torch.cat([bits(part.scales) for part in alone]))


@pytest.mark.parametrize("form", [TileFormat("e4m3", "128x128", "ue8m0"), TileFormat("e5m6", "128x128", "float32")])
def test_blocks_with_ragged_edges_are_those_of_the_definition(form: TileFormat) -> None:
    x = draw(5, 129, 130)
    assert_defined(quantise(x, form), x, form)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), FORMATS, st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_leading_axes_are_matrices_of_their_own(seed: int, form: TileFormat, leading: list[int]) -> None:
    form = form if form.tile != "tensor" else TileFormat(form.code, "128x128", form.scale)
    x = draw(seed, *leading, 3, 130)
    found = quantise(x, form)
    assert found.values().shape == x.shape
    for place in torch.cartesian_prod(*(torch.arange(length) for length in leading)).view(-1, len(leading)).tolist():
        alone = quantise(x[tuple(place)], form)
        assert torch.equal(bits(found.codes[tuple(place)]), bits(alone.codes))
        assert torch.equal(bits(found.scales[tuple(place)]), bits(alone.scales))


@pytest.mark.parametrize("code", ["e4m3", "e5m2"])
@pytest.mark.parametrize("exponent", [-126, -20, 0, 100])
def test_all_256_codes_come_back(code, exponent: int) -> None:
    """Each beside the largest code, so that the scale is what it was; and NaN and infinity where they are."""
    form = TileFormat(code)
    codes = torch.arange(256, dtype=torch.uint8)
    dtype = torch.float8_e4m3fn if code == "e4m3" else torch.float8_e5m2
    finite = codes.view(dtype).float().isfinite()
    largest = len(slow.magnitudes(code)) - 1
    rows = torch.stack([codes, torch.full_like(codes, largest)], 1)
    scales = torch.full((256, 1), 2.0**exponent).to(torch.float8_e8m0fnu)
    values = Quantised(rows.view(dtype), scales, form, 2).values()
    assert finite.sum() == {"e4m3": 254, "e5m2": 248}[code]
    assert torch.equal(values[:, 0].isfinite(), finite)
    exact = [slow.magnitudes(code)[int(byte) & 0x7F] for byte in codes[finite]]
    signed = [value * (-1 if byte & 0x80 else 1) for value, byte in zip(exact, codes[finite].tolist(), strict=True)]
    assert values[finite, 0].tolist() == [float(value * Fraction(2) ** exponent) for value in signed]
    again = quantise(values, form)
    assert torch.equal(bits(again.codes)[finite], rows[finite])
    assert torch.equal(again.scales.float().isnan().flatten(), ~finite)
    assert torch.equal(bits(again.scales)[finite], bits(scales)[finite])


@pytest.mark.parametrize("exponent", [-126, 0, 90])
def test_all_4096_codes_of_e5m6_come_back(exponent: int) -> None:
    form = TileFormat("e5m6")
    largest = len(slow.magnitudes("e5m6")) - 1
    codes = [[code, largest] for code in range(4096)]
    stored = torch.tensor(slow.packed(codes, "e5m6"), dtype=torch.uint8)
    scales = torch.full((4096, 1), 2.0**exponent).to(torch.float8_e8m0fnu)
    values = Quantised(stored, scales, form, 2).values()
    finite = [code & 0x7FF <= largest for code in range(4096)]
    assert sum(finite) == 2 * (largest + 1) == 4096 - 128 and values[:, 0].isfinite().tolist() == finite
    kept = torch.tensor(finite)
    expected = [
        float(slow.magnitudes("e5m6")[code & 0x7FF] * Fraction(2) ** exponent) * (-1 if code & 0x800 else 1)
        for code in range(4096)
        if finite[code]
    ]
    assert values[kept, 0].tolist() == expected
    assert torch.equal(quantise(values, form).codes[kept], stored[kept])


def test_one_huge_outlier_coarsens_its_own_tile_alone() -> None:
    x = torch.ones(1, 384)
    x[0, 200] = 1e30
    found = quantise(x, TileFormat())
    values = found.values()
    assert torch.equal(values[:, :128], x[:, :128]) and torch.equal(values[:, 256:], x[:, 256:])
    assert (values[0, 128:256] != 0).nonzero().tolist() == [[72]]
    assert not torch.equal(quantise(x, TileFormat(tile="tensor")).values()[:, :128], x[:, :128])


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("tile", ["1x128", "128x1", "128x128", "tensor"])
@pytest.mark.parametrize("code", CODES)
def test_what_is_not_finite_is_carried_and_counted(code, tile, bad: float) -> None:
    form = TileFormat(code, tile)
    x = draw(1, 200, 300)
    x[130, 140] = bad
    found, values = quantise_with_values(x, form, torch.float32)
    spoiled = torch.zeros(200, 300, dtype=torch.bool)
    rows = {"1x128": slice(130, 131), "tensor": slice(None)}.get(tile, slice(128, 200))
    columns = {"128x1": slice(140, 141), "tensor": slice(None)}.get(tile, slice(128, 256))
    spoiled[rows, columns] = True
    assert torch.equal(values.isnan(), spoiled) and found.bad_tiles() == 1
    assert torch.equal(round_trip(x, form, torch.bfloat16).isnan(), spoiled)


@settings(max_examples=25, deadline=None)
@given(matrices(st.integers(0, 140), st.sampled_from([1, 130])), FORMATS, FORMATS, FLOATS)
def test_the_other_ways_say_the_same(x: Tensor, form: TileFormat, source: TileFormat, dtype: torch.dtype) -> None:
    found, values = quantise_with_values(x, form, dtype)
    alone = quantise(x, form)
    assert torch.equal(bits(found.codes), bits(alone.codes)) and torch.equal(bits(found.scales), bits(alone.scales))
    assert torch.equal(bits(values), bits(dequantise(alone, dtype)))
    assert torch.equal(bits(values), bits(round_trip(x, form, dtype)))
    kept = quantise(x, TileFormat(source.code, "1x128", source.scale))
    turned = TileFormat(form.code, "128x1", form.scale)
    assert torch.equal(bits(turn_values(kept, turned, dtype)), bits(round_trip(kept.values(), turned, dtype)))
    groups = (len(x) // 3, 0, len(x) - len(x) // 3)
    expected = round_trip(kept.values(), turned, dtype, groups)
    assert torch.equal(bits(turn_values(kept, turned, dtype, groups)), bits(expected))


@pytest.mark.parametrize("form", [TileFormat("e4m3"), TileFormat("e5m2"), TileFormat("e5m6")])
def test_bf16_holds_values_under_powers_of_two_exactly(form: TileFormat) -> None:
    x = draw(3, 64, 384, specials=False)
    found = quantise(x, form)
    assert found.scales.float().min() >= 2.0**-113
    assert torch.equal(found.values(torch.bfloat16).float(), found.values())
    fractional = quantise(x, TileFormat(form.code, "1x128", "float32"))
    assert not torch.equal(fractional.values(torch.bfloat16).float(), fractional.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_never_require_a_gradient(dtype: torch.dtype) -> None:
    x = torch.ones(2, 130, dtype=dtype, requires_grad=True)
    found, values = quantise_with_values(x, TileFormat(), dtype)
    assert not any(part.requires_grad for part in (found.codes, found.scales, values, found.values()))


def test_wrong_input_is_refused_by_name() -> None:
    rows = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"2 groups of 3 rows .* adding up to the rows"):
        quantise(rows, TileFormat(tile="128x1"), (1, 2))
    with pytest.raises(ValueError, match="none negative"):
        round_trip(rows, TileFormat(tile="128x1"), torch.float32, (-1, 5))
    with pytest.raises(ValueError, match="128x1 tiles"):
        quantise_with_values(rows, TileFormat(), torch.float32, (4,))
    with pytest.raises(ValueError, match="128x1 tiles"):
        turn_values(quantise(rows, TileFormat()), TileFormat(tile="128x128"), torch.float32, (4,))
    with pytest.raises(ValueError, match="need rows and columns"):
        quantise(torch.ones(8), TileFormat(tile="128x128"))
    with pytest.raises(ValueError, match="floating-point"):
        quantise(torch.ones(4, 8, dtype=torch.int64), TileFormat())
    for field, value in (("code", "e3m4"), ("tile", "64x64"), ("scale", "e8m0")):
        with pytest.raises(ValueError, match=f"{field} is '{value}': choose one of"):
            TileFormat(**{field: value})  # type: ignore[arg-type]
