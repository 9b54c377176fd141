"""Block-scaled products: each within its bound of FP64, groups as if alone, NaN where it belongs, misfits by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8_gemm as op
from abyssal.kernels.fp8_bounds import error_bound
from abyssal.kernels.fp8_operands import Factor, activation, turned, weight_columns, weight_rows
from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.spec.tile_format import TILE, CodeName, ScaleName, TileFormat, TileName

SUMMATIONS: tuple[op.Summation, ...] = get_args(op.Summation)
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 256, 300]))
SCALES = st.sampled_from(["ue8m0", "float32"])
CODES = st.sampled_from(["e4m3", "e5m2"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
COUNTS = st.lists(st.one_of(st.just(0), st.integers(1, 9), st.sampled_from([128, 131])), min_size=1, max_size=4)
HALVES = st.sampled_from([(), (2,)])


def draw(seed: int, *shape: int) -> Tensor:
    """Values of very different sizes, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(3 * torch.randn(shape, generator=generator))
    kept = torch.rand(shape, generator=generator) > 0.1
    return torch.randn(shape, generator=generator) * sizes * kept


def form(tile: TileName, scale: ScaleName = "ue8m0", code: CodeName = "e4m3") -> TileFormat:
    return TileFormat(code, tile, scale)


def exact_values(operand: Quantised) -> Tensor:
    """code x scale in FP64, each value's tile found by its place."""
    codes, scales = operand.codes.float().double().numpy(), operand.scales.float().double().numpy()
    rows, columns = np.arange(codes.shape[-2]), np.arange(codes.shape[-1])
    if operand.form.tile == "1x128":
        scales = scales[..., columns // TILE]
    elif operand.form.tile == "128x128":
        scales = scales[..., (rows // TILE)[:, None], columns // TILE]
    elif operand.form.tile == "128x1":
        tile, tiles = 0, []
        for count in operand.counts or (len(rows),):
            tiles += [tile + row // TILE for row in range(count)]
            tile += -(-count // TILE)
        scales = scales[tiles]
    return torch.from_numpy(codes * scales)


def assert_within(y: Tensor, exact: Tensor, a: Factor, b: Factor, summation: op.Summation) -> None:
    assert y.shape == exact.shape
    if not y.numel():
        return
    worst = float(((y.double() - exact).abs() / error_bound(a, b, y.dtype, summation)).max())
    assert worst <= 1, f"{summation}: error is {worst:.3g} times the bound"


def possible(scale: ScaleName, summation: op.Summation) -> bool:
    """Tensor cores without promotion know powers of two alone."""
    return scale == "ue8m0" or summation != "tensor_core"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), SIZES, SIZES, SIZES, HALVES, SCALES, DTYPES, st.sampled_from(["1x128", "128x128"]))
def test_fprop_is_within_its_bound(seed, rows, inputs, outputs, halves, scale, dtype, tile):
    a = quantise(draw(seed, rows, inputs), form(tile, scale))
    b = quantise(draw(seed + 1, *halves, outputs, inputs), form("128x128", scale))
    exact = exact_values(a) @ exact_values(b).flatten(0, -2).t()
    for summation in SUMMATIONS:
        if possible(scale, summation):
            y = op.gemm(a, b, torch.float64 if summation == "float64" else dtype, summation)
            assert_within(y, exact, activation(a, "a"), weight_rows(b, "b"), summation)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), SIZES, SIZES, SIZES, HALVES, SCALES, CODES, st.sampled_from(["1x128", "128x128"]))
def test_dgrad_is_within_its_bound(seed, rows, inputs, outputs, halves, scale, code, tile):
    weight = quantise(draw(seed, *halves, outputs, inputs), form("128x128", scale))
    shape = (rows, *halves, outputs) if tile == "1x128" else (*halves, rows, outputs)
    dy = quantise(draw(seed + 1, *shape), form(tile, scale, code))
    values = exact_values(dy)
    if tile == "128x128" and halves:
        values = values.transpose(0, 1)
    exact = values.flatten(1) @ exact_values(weight).flatten(0, -2)
    for summation in SUMMATIONS:
        if possible(scale, summation):
            dx = op.gemm_input(dy, weight, torch.float64 if summation == "float64" else torch.float32, summation)
            assert_within(dx, exact, activation(dy, "dy"), weight_columns(weight, "weight"), summation)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), SIZES, SIZES, SIZES, SCALES, CODES)
def test_wgrad_is_within_its_bound(seed, rows, inputs, outputs, scale, code):
    dy = quantise(draw(seed, rows, outputs), form("128x1", scale, code))
    x = quantise(draw(seed + 1, rows, inputs), form("128x1", scale))
    exact = exact_values(dy).t() @ exact_values(x)
    for summation in SUMMATIONS:
        if possible(scale, summation):
            dw = op.gemm_weight(dy, x, summation)
            assert dw.dtype == (torch.float64 if summation == "float64" else torch.float32)
            assert_within(dw, exact, turned(dy, "dy"), turned(x, "x"), summation)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), COUNTS, SIZES, SIZES, HALVES, st.sampled_from(SUMMATIONS))
def test_groups_are_as_if_alone(seed, counts, inputs, outputs, halves, summation):
    rows, groups = sum(counts), len(counts)
    weight = quantise(draw(seed, groups, *halves, outputs, inputs), form("128x128"))
    x, dy = draw(seed + 1, rows, inputs), draw(seed + 2, rows, *halves, outputs)
    a, gradient = quantise(x, form("1x128")), quantise(dy, form("1x128"))
    y = op.grouped_gemm(a, weight, counts, torch.float32, summation)
    dx = op.grouped_gemm_input(gradient, weight, counts, torch.float32, summation)
    assert y.shape == (rows, outputs * (len(halves) + 1)) and dx.shape == (rows, inputs)
    flat = dy.flatten(1)
    turned_dy, turned_x = (quantise(each, form("128x1"), counts) for each in (flat, x))
    dw = op.grouped_gemm_weight(turned_dy, turned_x, counts, summation)
    assert dw.shape == (groups, flat.shape[1], inputs)
    parts = zip(x.split(counts), dy.split(counts), y.split(counts), dx.split(counts), dw, strict=True)
    for group, (own_x, own_dy, own_y, own_dx, own_dw) in enumerate(parts):
        if not len(own_x):
            assert not own_dw.any()
            continue
        one = replace(weight, codes=weight.codes[group], scales=weight.scales[group])
        assert torch.equal(own_y, op.gemm(quantise(own_x, form("1x128")), one, torch.float32, summation))
        assert torch.equal(own_dx, op.gemm_input(quantise(own_dy, form("1x128")), one, torch.float32, summation))
        own_turned = quantise(own_dy.flatten(1), form("128x1")), quantise(own_x, form("128x1"))
        assert torch.equal(own_dw, op.gemm_weight(*own_turned, summation))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    SIZES,
    HALVES,
    st.sampled_from(SUMMATIONS),
)
def test_rows_beyond_the_mask_are_not_read_and_are_zero(seed, masked, inputs, halves, summation):
    groups, most, outputs = len(masked), 6, 9
    weight = quantise(draw(seed, groups, *halves, outputs, inputs), form("128x128"))
    x = draw(seed + 1, groups, most, inputs)
    beyond = torch.arange(most) >= torch.tensor(masked).unsqueeze(1)
    x[beyond] = torch.nan
    a = quantise(x, form("1x128"))
    y = op.masked_gemm(a, weight, torch.tensor(masked), torch.float32, summation)
    assert not y[beyond].any()
    together = quantise(x[~beyond], form("1x128"))
    assert torch.equal(y[~beyond], op.grouped_gemm(together, weight, masked, torch.float32, summation))


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_one_scale_a_tensor(summation: op.Summation) -> None:
    whole = form("tensor", "float32")
    x, w, dy = draw(1, 140, 200), draw(2, 2, 70, 200), draw(3, 140, 2, 70)
    a, b, gradient = (quantise(each, whole) for each in (x, w, dy))
    flat = replace(gradient, codes=gradient.codes.flatten(1), columns=140)
    dtype = torch.float64 if summation == "float64" else torch.float32
    values_a, values_b, values_dy = exact_values(a), exact_values(b).flatten(0, 1), exact_values(flat)
    y, dx = op.gemm(a, b, dtype, summation), op.gemm_input(gradient, b, dtype, summation)
    dw = op.gemm_weight(flat, a, summation)
    assert_within(y, values_a @ values_b.t(), activation(a, "a"), weight_rows(b, "b"), summation)
    assert_within(dx, values_dy @ values_b, activation(gradient, "dy"), weight_columns(b, "b"), summation)
    assert_within(dw, values_dy.t() @ values_a, turned(flat, "dy"), turned(a, "a"), summation)
    stack = quantise(torch.stack([w, 2 * w]), whole)
    halves = [replace(stack, codes=stack.codes[group]) for group in range(2)]
    y = op.grouped_gemm(a, stack, [100, 40], dtype, summation)
    alone = [
        op.gemm(replace(a, codes=codes), half, dtype, summation)
        for codes, half in zip(a.codes.split([100, 40]), halves, strict=True)
    ]
    assert torch.equal(y, torch.cat(alone))
    last_dy, last_x = replace(flat, codes=flat.codes[100:]), replace(a, codes=a.codes[100:])
    dw = op.grouped_gemm_weight(flat, a, [100, 40], summation)
    assert torch.equal(dw[1], op.gemm_weight(last_dy, last_x, summation))


def test_weight_gradients_add_to_what_is_there():
    counts = [3, 0, 130]
    dy, x = (quantise(draw(seed, 133, width), form("128x1"), counts) for seed, width in ((1, 5), (2, 7)))
    fresh = op.grouped_gemm_weight(dy, x, counts)
    before = torch.randn(3, 5, 7)
    total = before.clone()
    assert op.grouped_gemm_weight(dy, x, counts, out_EOI=total) is total
    assert torch.equal(total, before + fresh) and torch.equal(total[1], before[1])
    dy, x = (quantise(draw(seed, 133, width), form("128x1")) for seed, width in ((1, 5), (2, 7)))
    one = before[0].clone()
    assert op.gemm_weight(dy, x, out_OI=one) is one
    assert torch.equal(one, before[0] + op.gemm_weight(dy, x))


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_nan_tile_reaches_what_it_has_part_in_and_no_more(summation: op.Summation) -> None:
    rows, inputs, outputs = 140, 150, 145
    x, w, dy = draw(1, rows, inputs), draw(2, outputs, inputs), draw(3, rows, outputs)
    bad_x, bad_w, bad_dy = x.clone(), w.clone(), dy.clone()
    bad_x[7, 140], bad_w[130, 10], bad_dy[135, 129] = torch.inf, torch.nan, -torch.inf

    def where(result: Tensor) -> list[tuple[int, int]]:
        """First and last row and column of what is NaN, which fills the rectangle between them."""
        places = result.isnan().nonzero()
        first, last = places.amin(0), places.amax(0)
        assert len(places) == (last - first + 1).prod()
        return list(zip(first.tolist(), last.tolist(), strict=True))

    by_row, by_block, turned_form = form("1x128"), form("128x128"), form("128x1")
    y = op.gemm(quantise(bad_x, by_row), quantise(w, by_block), torch.float32, summation)
    assert where(y) == [(7, 7), (0, 144)]
    y = op.gemm(quantise(x, by_row), quantise(bad_w, by_block), torch.float32, summation)
    assert where(y) == [(0, 139), (128, 144)]
    dx = op.gemm_input(quantise(bad_dy, by_row), quantise(w, by_block), torch.float32, summation)
    assert where(dx) == [(135, 135), (0, 149)]
    dx = op.gemm_input(quantise(dy, by_row), quantise(bad_w, by_block), torch.float32, summation)
    assert where(dx) == [(0, 139), (0, 127)]
    dw = op.gemm_weight(quantise(bad_dy, turned_form), quantise(x, turned_form), summation)
    assert where(dw) == [(129, 129), (0, 149)]
    counts = [130, 10]
    turned_dy, turned_x = quantise(bad_dy, turned_form, counts), quantise(x, turned_form, counts)
    grouped = op.grouped_gemm_weight(turned_dy, turned_x, counts, summation)
    assert not grouped[0].isnan().any() and where(grouped[1]) == [(129, 129), (0, 149)]


def test_bf16_products_are_exact_products_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As processors take that multiply BF16 fast."""
    monkeypatch.setattr(op, "multiplies_bf16", lambda: True)
    a, b = quantise(draw(1, 30, 200), form("1x128")), quantise(draw(2, 40, 200), form("128x128"))
    y = op.gemm(a, b, torch.bfloat16)
    assert_within(y, exact_values(a) @ exact_values(b).t(), activation(a, "a"), weight_rows(b, "b"), "float32")
    assert torch.equal(activation(a, "a").values(torch.bfloat16).double(), exact_values(a))


def test_bounds_catch_the_next_coarser_sum():
    a, b = (
        quantise(torch.rand(8, 4096, generator=torch.Generator().manual_seed(1)), form(tile))
        for tile in ("1x128", "128x128")
    )
    exact, factors = exact_values(a) @ exact_values(b).t(), (activation(a, "a"), weight_rows(b, "b"))
    coarser: list[tuple[op.Summation, op.Summation]] = [
        ("blocks", "float64"), ("promoted", "float32"), ("tensor_core", "promoted"),
    ]  # fmt: skip
    for summation, claimed in coarser:
        with pytest.raises(AssertionError, match="times the bound"):
            assert_within(op.gemm(a, b, torch.float32, summation).double(), exact, *factors, claimed)


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_no_rows_make_no_rows(summation: op.Summation) -> None:
    a, b = quantise(torch.zeros(0, 130), form("1x128")), quantise(draw(1, 2, 5, 130), form("128x128"))
    assert op.gemm(a, replace(b, codes=b.codes[0], scales=b.scales[0]), torch.bfloat16, summation).shape == (0, 5)
    assert op.grouped_gemm(a, b, [0, 0], torch.float32, summation).shape == (0, 5)
    x, dy = (quantise(torch.zeros(0, width), form("128x1")) for width in (4, 6))
    dw = op.gemm_weight(dy, x, summation)
    assert dw.shape == (6, 4) and not dw.any()


def _quantised(tile: TileName, *shape: int, counts: Sequence[int] | None = None, code: CodeName = "e4m3") -> Quantised:
    return quantise(torch.ones(shape), form(tile, code=code), counts)


def test_misfits_are_named():
    a, b = _quantised("1x128", 4, 200), _quantised("128x128", 6, 100)
    with pytest.raises(ValueError, match=r"a \(4, 200\), b \(6, 100\): they are summed over 200 and 100"):
        op.gemm(a, b, torch.float32)
    with pytest.raises(ValueError, match=r"dy \(4, 200\), weight \(6, 100\): they are summed over 200 and 6"):
        op.gemm_input(a, b, torch.float32)
    pair = _quantised("128x128", 2, 100, 7)
    with pytest.raises(ValueError, match="over 200 and 2 x 100 values"):
        op.gemm_input(a, pair, torch.float32)
    with pytest.raises(ValueError, match=r"a: \(6, 100\) in 128x1 tiles: this product wants 1x128"):
        op.gemm(_quantised("128x1", 6, 100), b, torch.float32)
    with pytest.raises(ValueError, match=r"b: \(6, 100\) in 128x1 tiles"):
        op.gemm(_quantised("1x128", 6, 100), _quantised("128x1", 6, 100), torch.float32)
    with pytest.raises(ValueError, match="a: e5m6"):
        op.gemm(_quantised("1x128", 4, 100, code="e5m6"), b, torch.float32)
    with pytest.raises(ValueError, match="summation is 'bf16': choose one of float32, blocks"):
        op.gemm(_quantised("1x128", 4, 100), b, torch.float32, "bf16")  # pyright: ignore[reportArgumentType]
    x, dy = _quantised("128x1", 4, 10), _quantised("128x1", 5, 10)
    with pytest.raises(ValueError, match=r"dy \(5, 10\), x \(4, 10\)"):
        op.gemm_weight(dy, x)
    with pytest.raises(ValueError, match=r"out: \(3, 3\)"):
        op.gemm_weight(x, x, out_OI=torch.zeros(3, 3))


def test_groups_that_do_not_fit_are_named():
    a, weight = _quantised("1x128", 4, 100), _quantised("128x128", 2, 6, 100)
    for counts in ([1, 1], [3, -1, 2], [5, -1]):
        with pytest.raises(ValueError, match=r"a \(4, 100\), b \(2, 6, 100\), counts"):
            op.grouped_gemm(a, weight, counts, torch.float32)
    with pytest.raises(ValueError, match="one for each of 3 groups"):
        op.grouped_gemm(a, weight, [1, 1, 2], torch.float32)
    with pytest.raises(ValueError, match="over 50 and 100 values"):
        op.grouped_gemm(_quantised("1x128", 0, 50), weight, [0, 0], torch.float32)
    masked = _quantised("1x128", 2, 3, 100)
    with pytest.raises(ValueError, match="more than 3"):
        op.masked_gemm(masked, weight, [1, 4], torch.float32)
    with pytest.raises(ValueError, match=r"masked_m \[1\]"):
        op.masked_gemm(masked, weight, [1], torch.float32)
    counted, whole = _quantised("128x1", 4, 6, counts=[1, 3]), _quantised("128x1", 4, 7)
    with pytest.raises(ValueError, match=r"x is of groups of \[4\] rows"):
        op.grouped_gemm_weight(counted, whole, [1, 3])
    with pytest.raises(ValueError, match="2 groups; use grouped_gemm_weight"):
        op.gemm_weight(counted, counted)
