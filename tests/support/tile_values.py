"""Values that are hard to quantise, and how their results are compared."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from abyssal.spec.tile_format import TileFormat

FORMATS = st.builds(
    TileFormat,
    st.sampled_from(["e4m3", "e5m2", "e5m6"]),
    st.sampled_from(["1x128", "128x1", "128x128", "tensor"]),
    st.sampled_from(["float32", "ue8m0"]),
)
_SPECIALS = (0.0, -0.0, 2.0**-149, -(2.0**-127), 448.0, 3.3e38, -1e30)
_NOT_FINITE = (float("inf"), -float("inf"), float("nan"), -float("nan"))


def draw(seed: int, *shape: int, specials: bool = True) -> Tensor:
    """FP32 of many magnitudes: half of the tensors tiny, large or zero as a whole; zeros of both signs, subnormals,
    ties, outliers and, in a few places, infinities and NaN among the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x *= torch.exp(4 * torch.randn(*shape, generator=generator, dtype=torch.float64))
    if not specials:
        return x.float()
    x *= (1.0, 1.0, 1.0, 1e-40, 1e-36, 1e30, 0.0)[int(torch.randint(7, (), generator=generator))]
    found = x.float().flatten()
    if len(found) == 0:
        return found.view(shape)
    ties = torch.randint(len(found), (len(found) // 4,), generator=generator)
    found[ties] = (found[ties].view(torch.int32) & -0x80000 | 0x80000).view(torch.float32)  # few bits, and half a step
    for value in _SPECIALS:
        if torch.rand((), generator=generator) < 0.3:
            found[torch.randint(len(found), (), generator=generator)] = value
    for value in _NOT_FINITE:
        if torch.rand((), generator=generator) < 0.08:
            found[torch.randint(len(found), (), generator=generator)] = value
    return found.view(shape)


def matrices(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> st.SearchStrategy[Tensor]:
    return st.builds(draw, st.integers(0, 2**31), rows, columns)


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that zeros of two signs differ; every NaN of FP32 and BF16 is the same one."""
    if tensor.dtype in (torch.float32, torch.bfloat16):
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.contiguous().view(integers)
