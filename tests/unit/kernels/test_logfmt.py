"""LogFMT: its codes by the paper's definition, the error bound, and why rounding is in linear space."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.logfmt import LARGEST_RANGE, bytes_per_token, encode_log
from abyssal.spec.tile_format import TILE


def made_rows(rows: int, columns: int, spread: float, seed: int) -> Tensor:
    """Values whose logarithms have the standard deviation ``spread``, with zeros, over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(rows, columns, generator=generator).sign()
    x_TI *= (spread * torch.randn(rows, columns, generator=generator)).exp()
    x_TI *= torch.logspace(-35, 20, 56)[torch.randint(56, (rows, 1), generator=generator)]
    x_TI[torch.rand(rows, columns, generator=generator) < 0.05] = 0
    return x_TI.nan_to_num().clamp(-3e38, 3e38)  # finite in BF16 too


def decoded_slowly(codes: list[int], low: float, step: float, bits: int) -> list[float]:
    """The decoding of the paper, a value at a time."""
    values = []
    for code in codes:
        sign, level = (-1.0 if code >> (bits - 1) else 1.0), code & ((1 << (bits - 1)) - 1)
        values.append(sign * (math.exp(low + step * (level - 1)) if level else 0.0))
    return values


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 3),
    st.integers(1, 300),
    st.floats(0, 20),
    st.sampled_from([4, 8, 10]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_the_error_is_within_the_bound(
    rows: int, columns: int, spread: float, bits: int, dtype: torch.dtype, seed: int
) -> None:
    x_TI = made_rows(rows, columns, spread, seed).to(dtype).float()
    found = encode_log(x_TI.to(dtype), bits)
    low_TI = found.low_Ti.double().repeat_interleave(TILE, -1)[:, :columns]
    step_TI = found.step_Ti.double().repeat_interleave(TILE, -1)[:, :columns]
    assert (step_TI <= LARGEST_RANGE / (2 ** (bits - 1) - 2) * (1 + 1e-6)).all()
    exact = x_TI.double()
    error = (found.values().double() - exact).abs()
    under = exact.abs() < low_TI.exp()
    bound = torch.where(under, torch.maximum((step_TI / 2).tanh() * exact.abs(), low_TI.exp() / 2), 0.0)
    bound = torch.maximum(bound, (step_TI / 2).tanh() * exact.abs()) + 2**-15 * exact.abs() + 2**-149
    assert (error <= bound).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.floats(0, 8), st.integers(0, 2**31))
def test_every_value_takes_the_nearest_level(columns: int, spread: float, seed: int) -> None:
    """Against all 128 levels of a tile, decoded as the paper writes it; a tie may go either way."""
    x_TI = made_rows(1, columns, spread, seed)
    found = encode_log(x_TI)
    for tile, values in enumerate(x_TI[0].split(TILE)):
        low, step = float(found.low_Ti[0, tile]), float(found.step_Ti[0, tile])
        levels = torch.tensor(decoded_slowly(list(range(128)), low, step, 8), dtype=torch.float64)
        codes = found.codes_TI[0, tile * TILE :][: len(values)].tolist()
        chosen = torch.tensor(decoded_slowly(codes, low, step, 8), dtype=torch.float64)
        exact = values.double()
        nearest = (levels[None] - exact.abs()[:, None]).abs().amin(1)
        assert ((chosen - exact).abs() <= nearest + 2**-15 * exact.abs() + 2**-149).all()
        assert torch.allclose(found.values()[0, tile * TILE :][: len(values)].double(), chosen, rtol=2**-15, atol=0)


def test_ends_of_a_tile_and_zero_have_the_codes_of_the_paper() -> None:
    x_TI = torch.tensor([[0.0, 1.0, -1.0, math.exp(3), -math.exp(3), 0.0]])
    found = encode_log(x_TI)
    assert found.codes_TI.tolist() == [[0x00, 0x01, 0x81, 0x7F, 0xFF, 0x00]]
    assert found.low_Ti.item() == 0 and found.step_Ti.item() == pytest.approx(3 / 126)


def test_a_tiny_value_does_not_coarsen_its_tile() -> None:
    x_TI = torch.tensor([[1.0, 2.0**-31, 2.0**-32, 0.6 * 2.0**-32, 0.4 * 2.0**-32, 1e-30]])
    found = encode_log(x_TI)
    assert found.low_Ti.item() == pytest.approx(-LARGEST_RANGE)
    assert found.codes_TI.tolist()[0][2:] == [1, 1, 0, 0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_value_spoils_its_tile_and_no_other(bad: float) -> None:
    x_TI = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    x_TI[1, 150], x_TI[1, 151] = bad, 0.0
    values_TI = encode_log(x_TI).values()
    assert values_TI[1, 128:256].isnan().all()
    values_TI[1, 128:256] = 0
    assert values_TI.isfinite().all()


def test_alike_values_zeros_and_the_largest_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    x_TI = torch.tensor([[5.0, -5.0, 5.0], [0.0, -0.0, 0.0], [largest, 1.0, -largest]])
    values_TI = encode_log(x_TI).values()
    assert values_TI.isfinite().all()
    assert torch.allclose(values_TI[:2], x_TI[:2], rtol=2**-15)
    assert values_TI[2, 0] == pytest.approx(largest, rel=2**-15) and values_TI[2, 0] == -values_TI[2, 2]
    assert encode_log(torch.empty(0, 5)).values().shape == (0, 5)


def test_rounding_in_linear_space_has_no_bias() -> None:
    """Evenly spread magnitudes: their mean survives linear rounding, and grows with logarithmic rounding."""
    x_TI = torch.rand(400, TILE, generator=torch.Generator().manual_seed(1)) + 0.001
    biases = {
        rounding: ((encode_log(x_TI, 5, rounding).values() - x_TI).double().mean() / x_TI.double().mean()).item()
        for rounding in ("linear", "log")
    }
    assert abs(biases["linear"]) < 1e-3 < 5e-3 < biases["log"]


def test_more_bits_less_error() -> None:
    x_TI = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = [(encode_log(x_TI, bits).values() - x_TI).norm().item() for bits in (4, 6, 8, 10)]
    assert all(finer < coarser / 3 for coarser, finer in pairwise(errors))


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="bits is 2"):
        encode_log(torch.zeros(1, 1), 2)
    with pytest.raises(ValueError, match="'nearest'"):
        encode_log(torch.zeros(1, 1), 8, "nearest")  # pyright: ignore[reportArgumentType]
    assert bytes_per_token(7168) == 7168 + 56 * 8 and bytes_per_token(128, 10) == 160 + 8
