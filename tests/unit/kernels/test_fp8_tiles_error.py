"""The error bound of quantised tiles against FP64: it holds, and a tighter one would not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.fp8_tiles import quantise
from abyssal.spec.tile_format import CODES, TILE, CodeName, ScaleName, TileFormat
from tests.support.tile_values import FORMATS, draw

SMALLEST_NORMAL = {"e4m3": -6, "e5m2": -14, "e5m6": -14}


def ratios(x: Tensor, form: TileFormat, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Error over bound of each finite value, and whether its code is a subnormal number."""
    found = quantise(x, form)
    exact, error = x.double(), (found.values(dtype).double() - x.double()).abs()
    scales = found.scales.double()
    if form.tile in ("1x128", "128x128"):
        scales = scales.repeat_interleave(TILE, -1)[:, : x.shape[1]]
    if form.tile in ("128x1", "128x128"):
        scales = scales.repeat_interleave(TILE, -2)[: len(x)]
    places, smallest = CODES[form.code].mantissa_bits, SMALLEST_NORMAL[form.code]
    relative, absolute = 2.0 ** -(places + 1) * exact.abs(), 2.0 ** (smallest - places - 1) * scales
    bound = torch.maximum(relative, absolute) * (1 + 2.0**-16) + 2.0**-149
    if dtype is torch.bfloat16 and form.scale == "float32":
        bound += 2.0**-8 * (exact.abs() + bound) + 2.0**-134
    finite = exact.isfinite() & scales.isfinite()
    return (error / bound).masked_fill(~finite, 0), (absolute > relative) & finite


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 128, 129]), st.sampled_from([1, 129, 300]), FORMATS)
def test_the_stated_bound_holds(seed: int, rows: int, columns: int, form: TileFormat) -> None:
    x = draw(seed, rows, columns).clamp(-(2.0**127), 2.0**127)
    assert ratios(x, form)[0].max() <= 1
    if quantise(x, form).scales.float().nan_to_num(1.0).min() >= 2.0**-113:
        assert ratios(x, form, torch.bfloat16)[0].max() <= 1


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_the_bound_is_tight(code: CodeName, scale: ScaleName) -> None:
    """Ties between subnormal codes reach it; and those above a power of two, but for what the power lacks of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 512, generator=generator) * torch.exp(5 * torch.randn(400, 512, generator=generator))
    ratio, subnormal = ratios(x, TileFormat(code, "1x128", scale))
    assert 0.99 < ratio[subnormal].max() <= 1
    reach = 1 / (1 + 2.0 ** -(CODES[code].mantissa_bits + 1))
    assert 0.99 * reach < ratio[~subnormal].max() <= 1
