"""The native RMSNorm and SwiGLU: within 4 units of FP64, the same bits on every instruction set and in any company."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import rms_norm, swiglu
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 255, 512]))
EPS = 1e-6
ULPS = 4


def isas() -> range:
    name = isa_name()
    assert name is not None
    return range(ISA_NAMES.index(name) + 1)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def assert_within_ulps(actual: Tensor | None, exact: Tensor, ulps: float = ULPS) -> None:
    assert actual is not None
    bound = ulps * torch.finfo(actual.dtype).eps * exact.abs() + 100 * torch.finfo(torch.float32).tiny
    worst = float(((actual.double() - exact).abs() / bound).max())
    assert worst <= 1, f"error is {worst:.3g} times the bound"


def rms_norm_rows(x_TD: Tensor, weight_D: Tensor, isa: int = -1) -> Tensor:
    y_TD = rms_norm.native(x_TD, weight_D, EPS, isa_limit=isa)
    assert y_TD is not None
    return y_TD


def swiglu_rows(gate_up_T2F: Tensor, weights_T: Tensor | None, isa: int = -1) -> Tensor:
    h_TF = swiglu.native(gate_up_T2F, weights_T, isa_limit=isa)
    assert h_TF is not None
    return h_TF


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), SIZES, FLOATS, FLOATS, st.sampled_from([1e-3, 1.0, 1e15]))
def test_rms_norm_is_within_its_bound_on_every_instruction_set(seed, rows, width, dtype, weight_dtype, scale):
    x_TD = draw(seed, rows, width + 3, dtype=dtype, scale=scale)[:, 3:]  # as the latent lies in a wider row
    weight_D = draw(seed + 1, width, dtype=weight_dtype)
    exact_TD = rms_norm.rms_norm_reference(x_TD.double(), weight_D.double(), EPS)
    results = [rms_norm_rows(x_TD, weight_D, isa) for isa in isas()]
    assert_within_ulps(results[0], exact_TD)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0], torch.cat([rms_norm_rows(x_TD[[row]], weight_D) for row in range(rows)]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), SIZES, FLOATS, st.one_of(st.none(), FLOATS), st.sampled_from([1, 30]))
def test_swiglu_is_within_its_bound_on_every_instruction_set(seed, rows, width, dtype, weights_dtype, scale):
    gate_up_T2F = draw(seed, rows, 2 * width + 3, dtype=dtype, scale=scale)[:, 3:]
    weights_T = None if weights_dtype is None else draw(seed + 1, rows, dtype=weights_dtype)
    exact_TF = swiglu.swiglu_reference(gate_up_T2F.double(), None if weights_T is None else weights_T.double())
    results = [swiglu_rows(gate_up_T2F, weights_T, isa) for isa in isas()]
    assert_within_ulps(results[0], exact_TF)
    assert all(torch.equal(results[0], other) for other in results[1:])
    one = [slice(row, row + 1) for row in range(rows)]
    alone = [swiglu_rows(gate_up_T2F[row], None if weights_T is None else weights_T[row]) for row in one]
    assert torch.equal(results[0], torch.cat(alone))


def test_swiglu_over_the_whole_range_of_gates():
    gate_F = torch.cat([torch.linspace(-120, 120, 100_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    exact_1F = swiglu.swiglu_reference(torch.cat([gate_F, torch.ones_like(gate_F)])[None].double())
    for isa in isas():
        h_1F = swiglu_rows(torch.cat([gate_F, torch.ones_like(gate_F)])[None], None, isa)
        assert_within_ulps(h_1F, exact_1F)
        below = gate_F < -87  # what exp loses there, and no more
        error_F = (h_1F[0].double() - exact_1F[0]).abs()[below]
        assert (error_F <= ULPS * 2.0**-23 * exact_1F[0, below].abs() + 2.0**-142).all()
        assert h_1F[0, -1] == 0 and math.isnan(swiglu_rows(torch.tensor([[math.nan, 1.0]]), None, isa))


def test_the_bound_catches_a_lost_bit():
    x_TD, weight_D = draw(0, 4, 64), draw(1, 64)
    exact_TD = rms_norm.rms_norm_reference(x_TD.double(), weight_D.double(), EPS)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within_ulps((exact_TD * (1 + 2.0**-20)).float(), exact_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    x_TD, weight_D, weights_T = draw(0, 1500, 512, dtype=dtype), draw(1, 512), draw(2, 1500)
    operators: list[Callable[[], Tensor]] = [
        lambda: rms_norm_rows(x_TD, weight_D),
        lambda: swiglu_rows(x_TD, weights_T),
    ]
    before = torch.get_num_threads()
    try:
        for operator in operators:
            torch.set_num_threads(1)
            expected = operator()
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(operator(), expected)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_apply_is_left_to_torch():
    x_TD, weight_D = draw(0, 3, 8), draw(1, 8)
    assert rms_norm.native(x_TD.double(), weight_D, EPS) is None
    assert rms_norm.native(x_TD[:, ::2], weight_D[:4], EPS) is None
    assert rms_norm.native(x_TD[None], weight_D, EPS) is None
    assert swiglu.native(x_TD.double(), None) is None
    assert swiglu.native(x_TD[:, ::2], None) is None
    assert swiglu.native(x_TD[0], None) is None
    assert rms_norm.rms_norm(x_TD[:, ::2], weight_D[:4], EPS).shape == (3, 4)
    assert swiglu.swiglu(x_TD[:, ::2]).shape == (3, 2)
    assert rms_norm_rows(x_TD[:0], weight_D).shape == (0, 8) and swiglu_rows(x_TD[:0], None).shape == (0, 4)
    with pytest.raises(RuntimeError):
        rms_norm.rms_norm(x_TD, weight_D[:7], EPS)


def test_gradients_still_flow():
    x_TD = draw(0, 3, 8).requires_grad_()
    swiglu.swiglu(rms_norm.rms_norm(x_TD, draw(1, 8), EPS)).sum().backward()
    assert x_TD.grad is not None and x_TD.grad.abs().sum() > 0
