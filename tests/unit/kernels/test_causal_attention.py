"""Attention in blocks: values and gradients of the definition, whatever the length."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels import attention as op
from abyssal.kernels.causal_attention import BLOCK, KEPT_BYTES, causal_attention, fits

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-6}


def problem(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 3, 10), (2, length, 3, 10), (2, length, 3, 6)]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(2, length, 3, 6, generator=generator).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> bool:
    return float((actual.double() - expected).abs().max()) <= allowed


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_values_and_gradients_of_the_definition(length: int, dtype: torch.dtype) -> None:
    leaves, gradient = problem(length, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = op.attention_reference(*exact, past=0, scale=0.3)  # type: ignore[misc]
    actual = causal_attention(*leaves, scale=0.3)  # type: ignore[misc]
    assert actual.dtype == dtype and close(
        actual.detach(), expected.detach(), BOUNDS[dtype] * float(expected.detach().abs().max())
    )
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())
    # One scale for all three: of a single position, the gradients of query and key are zero but for rounding.
    allowed = 4 * BOUNDS[dtype] * max(float(theirs.abs().max()) for theirs in expected_gradients)
    for mine, theirs in zip(torch.autograd.grad(actual, leaves, gradient), expected_gradients, strict=True):
        assert mine.dtype == dtype and close(mine, theirs, allowed)


def test_training_on_cpu_takes_it_and_long_sequences_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def record(q: torch.Tensor, *_: object) -> torch.Tensor:
        taken.append(q.shape[1])
        return q

    monkeypatch.setattr(op, "causal_attention", record)
    (q, k, v), _ = problem(8, torch.float32)
    op.attention(q, k, v, 0, 0.3)
    assert taken == [8]
    op.attention(q[:, 4:], k, v, 4, 0.3)  # a later part of the sequences
    op.attention(q, k[:, :, :1], v[:, :, :1], 0, 0.3)  # heads that share keys
    with torch.no_grad():
        op.attention(q, k, v, 0, 0.3)
    monkeypatch.setattr(op, "fits", lambda *_: False)
    op.attention(q, k, v, 0, 0.3)
    assert taken == [8]


def test_memory_kept_is_that_of_the_triangle() -> None:
    assert fits(8, 4096, 2) and not fits(128, 4096, 2)
    (q, k, v), _ = problem(3 * BLOCK, torch.float32)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention(q, k, v, 0.3)
    assert sum(sizes[4:]) == 6 * BLOCK * (BLOCK + 2 * BLOCK + 3 * BLOCK) * 4 <= KEPT_BYTES
