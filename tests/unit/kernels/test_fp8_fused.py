"""SwiGLU and RMSNorm between quantised products: the C++ has every byte of the composition that defines them, and the
composition is near FP64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8_rms_norm, fp8_swiglu
from abyssal.kernels import fp8_tiles_native as tiles
from abyssal.kernels.fp8_tiles import Quantised, quantise, round_trip
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.kernels.rms_norm import rms_norm_reference
from abyssal.kernels.swiglu import swiglu_reference
from abyssal.spec.tile_format import TileFormat
from tests.support.tile_values import bits

native = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
WEIGHTS = st.one_of(st.none(), FLOATS)
ROW_FORMATS = st.builds(TileFormat, st.sampled_from(["e4m3", "e5m2", "e5m6"]), st.just("1x128"))
ANY_SCALE = st.sampled_from(["float32", "ue8m0"])
ROWS = st.one_of(st.integers(0, 5), st.sampled_from([127, 128, 130]))
WIDTHS = st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129, 257, 515, 1537]))
SOME_BAD = st.sampled_from([None, None, float("nan"), float("inf")])
EPS = 1e-6


def isas() -> range:
    return range(ISA_NAMES.index(isa_name() or "") + 1)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, bad: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape, generator=generator))
    if bad is not None and x.numel():
        x.view(-1)[torch.randint(x.numel(), (), generator=generator)] = bad
    return x.to(dtype)


def weights(seed: int, rows: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.rand(rows, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: Sequence[Quantised | Tensor | None] | None, expected: Sequence[Quantised | Tensor | None]):
    assert actual is not None
    for one, other in zip(actual, expected, strict=True):
        if isinstance(one, Quantised) and isinstance(other, Quantised):
            assert one.form == other.form and one.columns == other.columns and one.scales.shape == other.scales.shape
            assert_same((one.codes, one.scales), (other.codes, other.scales))
        elif isinstance(one, Tensor) and isinstance(other, Tensor):
            assert one.shape == other.shape and one.dtype is other.dtype and torch.equal(bits(one), bits(other))
        else:
            assert one is None and other is None


@native
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), ROWS, WIDTHS, FLOATS, WEIGHTS, ROW_FORMATS, ROW_FORMATS, ANY_SCALE, FLOATS, SOME_BAD)
def test_forward_and_h_made_again(seed, rows, width, dtype, weights_dtype, kept, form, scale, out, bad) -> None:
    gate_up_T2F = draw(seed, rows, 2 * width + 3, dtype=dtype, bad=bad)[:, 3:]
    weights_T, form = weights(seed, rows, weights_dtype), TileFormat(form.code, "1x128", scale)
    expected = fp8_swiglu.composed_forward(gate_up_T2F, weights_T, kept, form, out)
    assert expected[0].codes.shape[:2] == (rows, 2) and expected[2].shape == (rows, width)
    counts = (rows // 3, 0, rows - rows // 3)
    again = [("1x128", None), ("128x1", counts), ("128x1", None), ("128x128", None)]
    for isa in isas():
        assert_same(fp8_swiglu.native_forward(gate_up_T2F, weights_T, kept, form, out, isa_limit=isa), expected)
        for tile, groups in again:
            turned = TileFormat(form.code, tile, scale)
            defined = fp8_swiglu.composed_again(expected[0], weights_T, turned, out, groups, dtype)
            parts = expected[0].codes, expected[0].scales, kept, width, weights_T
            found = tiles.swiglu_turned(*parts, dtype, turned, out, groups, isa_limit=isa)
            assert_same((found,), (defined,))


@native
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), ROWS, WIDTHS, FLOATS, WEIGHTS, ROW_FORMATS, ROW_FORMATS, ANY_SCALE, FLOATS, SOME_BAD)
def test_gradients(seed, rows, width, dtype, weights_dtype, kept, form, scale, out, bad) -> None:
    quantised = quantise(draw(seed, rows, 2, width), kept)
    weights_T, dh_TF = weights(seed, rows, weights_dtype), draw(seed + 1, rows, width + 1, dtype=dtype, bad=bad)[:, 1:]
    by_row, by_column = TileFormat(form.code, "1x128", scale), TileFormat("e5m2", "128x1", scale)
    for counts in (None, (rows // 3, 0, rows - rows // 3)):
        arguments = quantised, weights_T, dh_TF, by_row, by_column, out, counts
        expected = fp8_swiglu.composed_gradients(*arguments)
        for isa in isas():
            assert_same(fp8_swiglu.native_gradients(*arguments, isa_limit=isa), expected)


@native
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), ROWS, WIDTHS, FLOATS, FLOATS, ROW_FORMATS, ANY_SCALE, FLOATS, SOME_BAD)
def test_rms_norm(seed, rows, width, dtype, weight_dtype, form, scale, out, bad) -> None:
    x_TD = draw(seed, rows, width + 3, dtype=dtype, bad=bad)[:, 3:]
    weight_D, form = draw(seed + 1, width, dtype=weight_dtype), TileFormat(form.code, "1x128", scale)
    expected = fp8_rms_norm.composed(x_TD, weight_D, EPS, form, out)
    for isa in isas():
        assert_same(fp8_rms_norm.native(x_TD, weight_D, EPS, form, out, isa_limit=isa), expected)


@native
def test_threads_do_not_change_a_bit() -> None:
    gate_up_T2F, weights_T, dh_TF = draw(0, 300, 2 * 300), weights(0, 300, torch.float32), draw(1, 300, 300)
    kept, form, by_column = TileFormat("e5m6"), TileFormat(), TileFormat(tile="128x1")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            forward = fp8_swiglu.swiglu_quantised(gate_up_T2F, weights_T, kept, form, torch.bfloat16)
            assert_same(forward, fp8_swiglu.composed_forward(gate_up_T2F, weights_T, kept, form, torch.bfloat16))
            arguments = forward[0], weights_T, dh_TF, form, by_column, torch.bfloat16, (100, 200)
            assert_same(fp8_swiglu.swiglu_gradients(*arguments), fp8_swiglu.composed_gradients(*arguments))
            again = forward[0], weights_T, by_column, torch.bfloat16, (100, 200)
            assert_same((fp8_swiglu.swiglu_again(*again),), (fp8_swiglu.composed_again(*again),))
            norm = gate_up_T2F, gate_up_T2F[0], EPS, form, torch.bfloat16
            assert_same(fp8_rms_norm.rms_norm_quantised(*norm), fp8_rms_norm.composed(*norm))
    finally:
        torch.set_num_threads(before)


def assert_near(actual: Tensor, exact: Tensor) -> None:
    """Within a step of E5M6 of the largest value of the tile's row; the products before it are off by far less."""
    bound = 2.0**-6 * exact.abs() + 2.0**-19 * exact.abs().amax() + 1e-6
    assert ((actual.double() - exact).abs() <= bound).all()


def test_what_is_kept_is_enough_for_the_gradients_of_fp64() -> None:
    """h and every gradient, from codes of seven significant bits, are SwiGLU's in FP64 of the values that were kept."""
    form, by_column = TileFormat("e5m6"), TileFormat("e5m6", "128x1")
    gate_up_T2F, weights_T, dh_TF = draw(0, 64, 2 * 200), weights(1, 64, torch.float32), draw(2, 64, 200)
    assert weights_T is not None
    kept, h, values = fp8_swiglu.swiglu_quantised(gate_up_T2F, weights_T, form, form, torch.float32)
    assert_near(values, swiglu_reference(gate_up_T2F.double(), weights_T.double()))
    assert torch.equal(values, h.values())
    inputs, exact_weights = kept.values().flatten(1).double().requires_grad_(), weights_T.double().requires_grad_()
    again = swiglu_reference(inputs, exact_weights)
    again.backward(dh_TF.double())
    assert inputs.grad is not None and exact_weights.grad is not None
    assert_near(
        fp8_swiglu.swiglu_again(kept, weights_T, by_column, torch.float32, (10, 54), torch.float32), again.detach()
    )
    rows, columns, dweights = fp8_swiglu.swiglu_gradients(kept, weights_T, dh_TF, form, by_column, torch.float32)
    for found in (rows, columns):
        assert_near(found, inputs.grad)
    assert dweights is not None
    torch.testing.assert_close(dweights.double(), exact_weights.grad, rtol=1e-4, atol=1e-4)


def test_the_norm_is_near_fp64_and_quantised_by_way_of_the_activations_dtype() -> None:
    x_TD, weight_D = draw(0, 20, 300, dtype=torch.bfloat16), draw(1, 300, dtype=torch.bfloat16)
    found, values = fp8_rms_norm.rms_norm_quantised(x_TD, weight_D, EPS, TileFormat("e5m6"), torch.float32)
    assert torch.equal(found.values(), values)
    exact = rms_norm_reference(x_TD.double(), weight_D.double(), EPS)
    assert not torch.equal(values, round_trip(exact.float(), TileFormat("e5m6"), torch.float32))
    x_TD, weight_D = x_TD.float(), weight_D.float()
    assert_near(fp8_rms_norm.rms_norm_quantised(x_TD, weight_D, EPS, TileFormat("e5m6"), torch.float32)[1], exact)


def test_what_does_not_apply_is_composed() -> None:
    gate_up_T2F, form, blocks = draw(0, 4, 12).double(), TileFormat(), TileFormat(tile="128x128")
    assert fp8_swiglu.native_forward(gate_up_T2F, None, form, form, torch.float32) is None
    kept, _, values = fp8_swiglu.swiglu_quantised(gate_up_T2F, None, form, form, torch.float64)
    assert values.dtype is torch.float64
    dh_TF = draw(1, 4, 6)
    assert fp8_swiglu.native_gradients(kept, None, dh_TF, form, blocks, torch.float32) is None
    rows, columns, none = fp8_swiglu.swiglu_gradients(kept, None, dh_TF, form, blocks, torch.float32)
    assert rows.shape == columns.shape == (4, 12) and none is None
    with pytest.raises(ValueError, match="128x1 tiles"):
        fp8_swiglu.swiglu_again(kept, None, blocks, torch.float32, (1, 3))
    assert fp8_rms_norm.native(gate_up_T2F, gate_up_T2F[0], EPS, form, torch.float32) is None
    assert fp8_rms_norm.rms_norm_quantised(gate_up_T2F, gate_up_T2F[0], EPS, form, torch.float32)[1].shape == (4, 12)
