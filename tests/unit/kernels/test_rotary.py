"""Native rotary positions: the definition's values on every instruction set, whatever stands beside a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels import rotary as op
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.model.rope import Rotation, apply_rotation

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 20), st.booleans(), st.booleans(), st.booleans())
def test_it_is_the_definition_rounded(seed, tokens, pairs, heads, interleaved, bf16):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    shape = (tokens, 3, 2 * pairs + 5) if heads else (tokens, 2 * pairs + 5)
    x = torch.randn(shape, generator=generator).to(dtype)[..., 5:]
    turns = torch.polar(torch.full((tokens, pairs), 1.25), torch.rand(tokens, pairs, generator=generator) * 100)
    wide = apply_rotation(x.double(), Rotation(turns.to(torch.complex128), interleaved))
    name = isa_name()
    assert name is not None
    found = [op.native(x, turns, interleaved, isa_limit=isa) for isa in range(ISA_NAMES.index(name) + 1)]
    first = found[0]
    for y in found:
        assert y is not None and first is not None and y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
        assert torch.equal(y, first)
        size = torch.finfo(dtype).eps / 2 * wide.abs() + 2.0**-22 * x.double().abs().amax()
        assert ((y.double() - wide).abs() <= size * 1.01).all()
        alone = op.native(x[-1:], turns[-1:], interleaved)
        assert alone is not None and torch.equal(y[-1:], alone)


def test_gradients_and_fp64_are_left_to_torch():
    x, turns = torch.randn(2, 6), torch.randn(2, 3, dtype=torch.complex64)
    assert op.native(x.double(), turns, True) is None and op.native(x, turns[:, :2], True) is None
    assert op.native(x, turns.to(torch.complex128), True) is None
    assert apply_rotation(x.requires_grad_(), Rotation(turns, True)).requires_grad
