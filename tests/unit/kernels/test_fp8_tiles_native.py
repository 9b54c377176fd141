"""The C++ of quantised tiles has the bytes of the reference: on every instruction set, with any threads and strides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8_tiles_native as native
from abyssal.kernels import fp8_tiles_reference as reference
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.spec.tile_format import TileFormat
from tests.support.tile_values import bits, draw

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
FORMATS = st.builds(
    TileFormat,
    st.sampled_from(["e4m3", "e5m2", "e5m6"]),
    st.sampled_from(["1x128", "128x1", "128x128"]),
    st.sampled_from(["float32", "ue8m0"]),
)
ROWS = st.one_of(st.integers(0, 9), st.sampled_from([127, 128, 129, 260]))
COLUMNS = st.one_of(st.integers(0, 9), st.sampled_from([127, 128, 129, 513, 1535, 1537, 1700]))
LEADING = st.lists(st.integers(0, 3), max_size=2)


def isas() -> range:
    return range(ISA_NAMES.index(isa_name() or "") + 1)


def assert_same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None and actual.dtype is expected.dtype and actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def assert_reference(x: Tensor, form: TileFormat, dtype: torch.dtype, counts: Sequence[int] | None, isa: int) -> None:
    codes, scales = reference.quantise(x, form, counts)
    values = reference.dequantise(codes, scales, form, x.shape[-1], dtype, counts)
    found = native.quantise(x, form, dtype, counts, isa_limit=isa)
    assert found is not None
    assert_same(found.codes, codes)
    assert_same(found.scales, scales)
    assert_same(found.values, values)
    alone = native.quantise(x, form, dtype, counts, codes=False, isa_limit=isa)
    assert alone is not None and alone.codes is None and alone.scales is None
    assert_same(alone.values, values)
    assert_same(native.dequantise(codes, scales, form, x.shape[-1], dtype, counts, isa_limit=isa), values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), LEADING, ROWS, COLUMNS, FORMATS, FLOATS, FLOATS)
def test_bytes_are_those_of_the_reference(seed, leading, rows, columns, form, dtype, out) -> None:
    x = draw(seed, *leading, rows, columns).to(dtype)
    for isa in isas():
        assert_reference(x, form, out, None, isa)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.sampled_from([0, 1, 127, 128, 130]), max_size=4), COLUMNS, FORMATS, FLOATS)
def test_groups_of_rows_are_those_of_the_reference(seed, counts, columns, form, dtype) -> None:
    x = draw(seed, sum(counts), columns).to(dtype)
    for isa in isas():
        assert_reference(x, TileFormat(form.code, "128x1", form.scale), torch.float32, counts, isa)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.lists(st.sampled_from([0, 1, 127, 128]), max_size=3), COLUMNS, FORMATS, FORMATS, FLOATS
)
def test_turned_values_are_those_of_the_reference(seed, counts, columns, source, form, out) -> None:
    source = TileFormat(source.code, "1x128", source.scale)
    codes, scales = reference.quantise(draw(seed, sum(counts), columns), source)
    values = reference.dequantise(codes, scales, source, columns, torch.float32)
    for groups in (counts, None) if form.tile == "128x1" else (None,):
        again = reference.quantise(values, form, groups)
        expected = reference.dequantise(*again, form, columns, out, groups)
        for isa in isas():
            assert_same(native.turn(codes, scales, source, columns, form, out, groups, isa_limit=isa), expected)


@pytest.mark.parametrize("form", [TileFormat("e5m6"), TileFormat(tile="128x1"), TileFormat("e5m2", "128x128")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_is_read_as_it_is(form: TileFormat, dtype: torch.dtype) -> None:
    wide = draw(3, 3, 130, 271).to(dtype)
    halves = draw(4, 40, 2 * 150 + 3)[:, 3:].to(dtype).unflatten(-1, (2, -1))
    for x in (wide[..., 5:], wide[1, ::3, 2:], wide.transpose(0, 1), wide.transpose(1, 2), halves, halves[:, 0]):
        assert_reference(x, form, torch.bfloat16, None, -1)
    assert_reference(wide[1, ::3, 2:], TileFormat(tile="128x1"), torch.bfloat16, (7, 0, 37), -1)


def test_threads_do_not_change_a_bit_nor_write_beside_their_rows() -> None:
    """E5M6 rows of an odd number of bytes, so that eight bytes at once would reach into the next row."""
    x, before = draw(0, 260, 399), torch.get_num_threads()
    try:
        for form in (TileFormat("e5m6"), TileFormat("e5m6", "128x1"), TileFormat(tile="128x128")):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert_reference(x, form, torch.float32, None, -1)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_apply_is_left_to_the_reference() -> None:
    x, form = draw(0, 4, 200), TileFormat()
    codes, scales = reference.quantise(x, form)
    assert native.quantise(x.double(), form) is None
    assert native.quantise(x, form, torch.float64) is None
    assert native.quantise(x, TileFormat(tile="tensor")) is None
    assert native.quantise(x, TileFormat(tile="128x1"), None, (3, 2)) is None  # more rows than there are
    assert native.dequantise(codes, scales, form, 200, torch.float64) is None
    assert native.dequantise(codes, scales[:, :1], form, 200, torch.float32) is None
    assert native.dequantise(codes.view(torch.uint8), scales, form, 200, torch.float32) is None
    assert native.turn(codes, scales, form, 300, TileFormat(tile="128x1"), torch.float32) is None
    assert native.turn(codes, scales, form, 200, TileFormat(tile="tensor"), torch.float32) is None
