"""RMSNorm and SwiGLU: values within their bounds, gradients those of autograd on the definition."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels.rms_norm import rms_norm, rms_norm_reference
from abyssal.kernels.swiglu import swiglu, swiglu_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ULPS = 4


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * values).to(dtype)


def within_ulps(actual: torch.Tensor, exact: torch.Tensor) -> bool:
    """Each within ULPS units in the last place of its exact value."""
    unit = torch.finfo(actual.dtype).eps * exact.abs()
    return bool(((actual.double() - exact).abs() <= ULPS * unit + 1e-300).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
def test_rms_norm(dtype: torch.dtype, grad: bool, weight_dtype: str) -> None:
    x = random(9, 70, seed=0, dtype=dtype).requires_grad_(grad)
    weight = random(70, seed=1, dtype=dtype if weight_dtype == "same" or dtype == torch.float64 else torch.float32)
    y = rms_norm(x, weight, 1e-6)
    exact = rms_norm_reference(x.detach().double(), weight.double(), 1e-6)
    assert y.dtype == dtype and within_ulps(y.detach(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(dtype: torch.dtype, grad: bool, weighted: bool) -> None:
    x = random(9, 40, seed=0, dtype=dtype).requires_grad_(grad)
    wide = torch.promote_types(dtype, torch.float32)
    weights = random(9, seed=1, dtype=wide) if weighted else None
    h = swiglu(x, weights)
    exact = swiglu_reference(x.detach().double(), None if weights is None else weights.double())
    assert h.dtype == dtype and within_ulps(h.detach(), exact)


def test_rms_norm_gradients() -> None:
    x = random(5, 12, seed=0, dtype=torch.float64).requires_grad_()
    weight = random(12, seed=1, dtype=torch.float64).requires_grad_()
    dy = random(5, 12, seed=2, dtype=torch.float64)
    expected = torch.autograd.grad(rms_norm_reference(x, weight, 1e-6), (x, weight), dy)
    actual = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), dy)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_gradients(weighted: bool) -> None:
    x = random(5, 12, seed=0, dtype=torch.float64).requires_grad_()
    weights = random(5, seed=1, dtype=torch.float64).requires_grad_() if weighted else None
    dy = random(5, 6, seed=2, dtype=torch.float64)
    leaves = (x,) if weights is None else (x, weights)
    expected = torch.autograd.grad(swiglu_reference(x, weights), leaves, dy)
    actual = torch.autograd.grad(swiglu(x, weights), leaves, dy)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(actual, expected, strict=True))
