"""FP8 cache entries: within their bound, the same bytes natively on every instruction set and in any company."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import fp8_entries
from abyssal.kernels.fp8_entries import dequantise_entries, native_read, native_write, quantise_entries
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.spec.fp8_entry import TILE, Fp8Entry

native = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
V3 = Fp8Entry(1, 512, 64)
ENTRIES = st.one_of(
    st.just(V3), st.builds(Fp8Entry, st.integers(1, 3), st.integers(1, 300), st.sampled_from([0, 1, 4, 34]))
)


def isas() -> range:
    return range(ISA_NAMES.index(isa_name() or "") + 1)


def draw(seed: int, tokens: int, entry: Fp8Entry, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Values of many magnitudes, with zeros and a tile of nothing else among them."""
    generator = torch.Generator().manual_seed(seed)
    values_TX = torch.randn(tokens, entry.values, generator=generator, dtype=torch.float64)
    values_TX *= 10 ** (2 * torch.randn(tokens, entry.values, generator=generator)) * scale
    values_TX[:, ::7] = 0
    values_TX[0, : min(TILE, entry.run_values)] = 0
    return values_TX.to(dtype)


def bounds(values_TX: Tensor, entry: Fp8Entry, dtype: torch.dtype) -> Tensor:
    """Of the error, value by value: the one of the docstring."""
    codes_TX, plain_TX = values_TX.double().abs().split([entry.num_codes, entry.plain_values], 1)
    tiles = [run.split(TILE, 1) for run in codes_TX.split(entry.run_values, 1)]
    bound = []
    for tile in (tile for run in tiles for tile in run):
        scale_T1 = (tile.amax(1, keepdim=True) / 448).clamp(min=2.0**-126)
        bound.append(torch.maximum(2.0**-4 * tile, 2.0**-10 * (1 + 2.0**-18) * scale_T1))
        if dtype == torch.bfloat16:
            bound[-1] += 2.0**-8 * (tile + bound[-1])
    return torch.cat([*bound, 2.0**-8 * plain_TX], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), ENTRIES, FLOATS, FLOATS, st.sampled_from([1e-20, 1.0, 1e20]))
def test_entries_are_within_their_bound(seed, tokens, entry, dtype, out, scale) -> None:
    values_TX = draw(seed, tokens, entry, dtype, scale)
    rows_TY = quantise_entries(values_TX, entry)
    assert rows_TY.shape == (tokens, entry.num_bytes) and rows_TY.dtype == torch.uint8
    read_TX = dequantise_entries(rows_TY, entry, out)
    assert read_TX.dtype == out
    error_TX = (read_TX.double() - values_TX.double()).abs()
    assert (error_TX <= bounds(values_TX, entry, out)).all()


@native
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), ENTRIES, FLOATS, FLOATS, st.sampled_from([1e-20, 1.0, 1e20]))
def test_native_entries_have_the_bytes_of_their_reference(seed, tokens, entry, dtype, out, scale) -> None:
    """On every instruction set, scattered, and each alone as in company; other entries stay as they are."""
    values_TX = draw(seed, tokens, entry, dtype, scale)
    slots_T = torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(seed))[:tokens]
    rows_NY = torch.full((tokens + 3, entry.num_bytes), 9, dtype=torch.uint8)
    expected_NY = rows_NY.index_copy(0, slots_T, quantise_entries(values_TX, entry))
    for isa in isas():
        found_NY = rows_NY.clone()
        assert native_write(found_NY, slots_T, values_TX, entry, isa_limit=isa)
        assert torch.equal(found_NY, expected_NY)
        read_TX = native_read(found_NY, slots_T, entry, out, isa_limit=isa)
        assert read_TX is not None
        assert torch.equal(read_TX, dequantise_entries(expected_NY[slots_T], entry, out))
    for slot, value_X in zip(slots_T, values_TX, strict=True):
        assert native_write(rows_NY, slot[None], value_X[None], entry)
    assert torch.equal(rows_NY, expected_NY)


@native
def test_every_code_and_every_rounding_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[~codes.view(torch.float8_e4m3fn).float().isnan()]
    exact = finite.view(torch.float8_e4m3fn).float()
    between = (exact.sort().values[1:] + exact.sort().values[:-1]) / 2  # ties to even
    near = torch.cat([between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9))])
    values = torch.cat([exact, near])
    entry = Fp8Entry(len(values), 2)
    pairs = torch.stack([torch.full_like(values, 448.0), values], 1).view(1, -1)  # so that every scale is 1
    rows_1Y = torch.zeros(1, entry.num_bytes, dtype=torch.uint8)
    for isa in isas():
        assert native_write(rows_1Y, torch.tensor([0]), pairs, entry, isa_limit=isa)
        assert torch.equal(rows_1Y[0, 1 : entry.num_codes : 2], values.to(torch.float8_e4m3fn).view(torch.uint8))
        read_1X = native_read(rows_1Y, torch.tensor([0]), entry, torch.float32, isa_limit=isa)
        assert read_1X is not None and torch.equal(read_1X[0, 1 : 2 * len(exact) : 2], exact)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_spoils_its_own_tile(bad: float) -> None:
    values_TX = draw(0, 2, V3)
    values_TX[0, 130] = bad
    rows_NY = torch.zeros(2, V3.num_bytes, dtype=torch.uint8)
    fp8_entries.write_entries(rows_NY, torch.tensor([0, 1]), values_TX, V3)
    assert torch.equal(rows_NY, quantise_entries(values_TX, V3))
    read_TX = fp8_entries.read_entries(rows_NY, torch.tensor([0, 1]), V3, torch.float32)
    spoiled = torch.zeros(2, V3.values, dtype=torch.bool)
    spoiled[0, 128:256] = True
    assert torch.equal(read_TX.isnan(), spoiled)


@native
def test_threads_do_not_change_a_bit() -> None:
    values_TX, slots_T = draw(0, 700, V3), torch.randperm(700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            rows_NY = torch.zeros(700, V3.num_bytes, dtype=torch.uint8)
            assert native_write(rows_NY, slots_T, values_TX, V3)
            results.append((rows_NY, native_read(rows_NY, slots_T, V3, torch.bfloat16)))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    finally:
        torch.set_num_threads(before)


def test_what_does_not_apply_is_left_to_torch_and_what_is_wrong_is_refused() -> None:
    rows_NY, values_TX = torch.zeros(2, V3.num_bytes, dtype=torch.uint8), draw(0, 1, V3)
    assert not native_write(rows_NY, torch.tensor([0]), values_TX.double(), V3)
    assert native_read(rows_NY, torch.tensor([0]), V3, torch.float64) is None
    fp8_entries.write_entries(rows_NY, torch.tensor([1]), values_TX.double(), V3)
    assert torch.equal(rows_NY[1:], quantise_entries(values_TX, V3))
    for slot in (-1, 2):
        assert not native_write(rows_NY, torch.tensor([slot]), values_TX, V3)
        assert native_read(rows_NY, torch.tensor([slot]), V3, torch.float32) is None
    with pytest.raises(IndexError):
        fp8_entries.write_entries(rows_NY, torch.tensor([2]), values_TX, V3)
    assert fp8_entries.read_entries(rows_NY, torch.empty(0, dtype=torch.int64), V3, torch.float32).shape == (0, 576)
