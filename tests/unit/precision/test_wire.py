"""Tokens as rows of bytes: exact both ways, and rows may be gathered before or after they are packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.precision.wire import bytes_per_token, pack, unpack
from abyssal.spec.tile_format import TileFormat

FORMS = st.builds(
    TileFormat, code=st.sampled_from(["e4m3", "e5m2", "e5m6"]), scale=st.sampled_from(["ue8m0", "float32"])
)
ROWS, COLUMNS, SEEDS = st.integers(0, 5), st.integers(1, 400), st.integers(0, 2**31)


def made_tokens(rows: int, columns: int, seed: int) -> Tensor:
    """Tokens of many magnitudes, some with a NaN, an infinity or a tile of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(rows, columns, generator=generator)
    x_TI *= torch.logspace(-30, 30, 61)[torch.randint(61, (rows, 1), generator=generator)]
    odd_TI = torch.randint(200, (rows, columns), generator=generator)
    x_TI[odd_TI == 0], x_TI[odd_TI == 1] = torch.nan, -torch.inf
    x_TI[::3, :128] = 0
    return x_TI


def raw_bytes(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bytes(a: Quantised, b: Quantised) -> bool:
    parts = ((a.codes, b.codes), (a.scales, b.scales))
    alike = all(x.dtype is y.dtype and x.shape == y.shape for x, y in parts)
    raw = [(raw_bytes(x), raw_bytes(y)) for x, y in parts]
    return alike and (a.form, a.columns) == (b.form, b.columns) and all(torch.equal(x, y) for x, y in raw)


@settings(deadline=None)
@given(ROWS, COLUMNS, FORMS, SEEDS)
def test_the_same_bytes_come_back(rows: int, columns: int, form: TileFormat, seed: int) -> None:
    quantised = quantise(made_tokens(rows, columns, seed), form)
    bytes_TX = pack(quantised)
    assert bytes_TX.dtype is torch.uint8 and bytes_TX.is_contiguous()
    assert bytes_TX.shape == (rows, bytes_per_token(columns, form))
    back = unpack(bytes_TX, columns, form)
    assert same_bytes(back, quantised)
    assert torch.equal(back.values().view(torch.int32), quantised.values().view(torch.int32))


@settings(deadline=None)
@given(ROWS, COLUMNS, FORMS, SEEDS, st.data())
def test_rows_gathered_after_packing_are_rows_quantised_after_gathering(
    rows: int, columns: int, form: TileFormat, seed: int, data: st.DataObject
) -> None:
    x_TI = made_tokens(rows, columns, seed)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=8)) if rows else []
    index = torch.tensor(chosen, dtype=torch.int64)
    assert same_bytes(unpack(pack(quantise(x_TI, form))[index], columns, form), quantise(x_TI[index], form))


@given(COLUMNS, FORMS, st.integers(0, 5))
def test_a_token_takes_the_bytes_of_its_format(columns: int, form: TileFormat, rows: int) -> None:
    assert rows * bytes_per_token(columns, form) == form.num_bytes(rows, columns)


def test_rows_cut_out_of_a_larger_buffer_are_read_where_they_lie() -> None:
    form = TileFormat("e4m3", "1x128", "float32")
    x_TI = made_tokens(6, 256, 1)
    packed = pack(quantise(x_TI, form))
    for margin in (0, 1, 4):  # a margin of one byte puts FP32 scales between words
        buffer = torch.zeros(8, packed.shape[-1] + margin, dtype=torch.uint8)
        buffer[2:, margin:] = packed
        assert same_bytes(unpack(buffer[2:, margin:], 256, form), quantise(x_TI, form))


def test_codes_and_power_of_two_scales_are_views() -> None:
    bytes_TX = pack(quantise(torch.randn(4, 300), TileFormat()))
    back = unpack(bytes_TX, 300, TileFormat())
    assert back.codes.data_ptr() == bytes_TX.data_ptr()
    assert back.scales.data_ptr() == bytes_TX.data_ptr() + 300


def test_half_the_bytes_of_bf16() -> None:
    assert bytes_per_token(7168, TileFormat()) == 7168 + 56


def test_what_is_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="send 1x128 tiles"):
        pack(quantise(torch.randn(128, 128), TileFormat(tile="128x128")))
    with pytest.raises(ValueError, match="send 1x128 tiles"):
        bytes_per_token(128, TileFormat(tile="tensor"))
    with pytest.raises(ValueError, match="rows of 129 uint8"):
        unpack(torch.zeros(3, 132, dtype=torch.uint8), 128, TileFormat())
    with pytest.raises(ValueError, match=r"not \(3, 129\) of torch.int8"):
        unpack(torch.zeros(3, 129, dtype=torch.int8), 128, TileFormat())
