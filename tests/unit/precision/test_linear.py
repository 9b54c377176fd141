"""Products whose backward comes apart: against autograd in FP64, whole and in two halves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from abyssal.kernels.native import native_library
from abyssal.precision.head import linear_cross_entropy, token_losses
from abyssal.precision.linear import WeightQueue, grouped_linear, linear
from abyssal.precision.recipe import LinearEntry, Recipe

ENTRY = LinearEntry()


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def grouped_by_autograd(x_TI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([rows @ matrix.t() for rows, matrix in zip(x_TI.split(counts), weight_EOI, strict=True)])


@pytest.mark.parametrize("split", [False, True])
def test_linear_gradients(split: bool) -> None:
    x, weight, dy = leaf(7, 5), leaf(4, 5, seed=1), leaf(7, 4, seed=2).detach()
    expected = torch.autograd.grad(x @ weight.t(), (x, weight), dy)
    queue = WeightQueue() if split else None
    linear(x, weight, ENTRY, queue).backward(dy)
    if queue is not None:
        assert weight.grad is None and len(queue) == 1
        queue.run()
    assert x.grad is not None and weight.grad is not None
    assert torch.allclose(x.grad, expected[0], rtol=1e-12) and torch.allclose(weight.grad, expected[1], rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.booleans())
def test_grouped_linear_gradients_with_empty_groups(counts: list[int], split: bool) -> None:
    x, weight = leaf(sum(counts), 3), leaf(len(counts), 4, 3, seed=1)
    dy = leaf(sum(counts), 4, seed=2).detach()
    expected = torch.autograd.grad(grouped_by_autograd(x, weight, counts), (x, weight), dy)
    queue = WeightQueue() if split else None
    y = grouped_linear(x, weight, counts, ENTRY, queue)
    y.backward(dy)
    if queue is not None:
        queue.run()
    assert x.grad is not None and weight.grad is not None
    assert torch.allclose(x.grad, expected[0], rtol=1e-12) and torch.allclose(weight.grad, expected[1], rtol=1e-12)


def test_queue_adds_to_a_gradient_that_is_there() -> None:
    x, weight = leaf(3, 2), leaf(4, 2, seed=1)
    queue = WeightQueue()
    for _ in range(2):
        linear(x, weight, ENTRY, queue).sum().backward()
    queue.run()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * x.detach().sum(0).expand(4, 2))


def test_operands_follow_the_recipe() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    weight = torch.randn(4, 8, requires_grad=True)
    assert linear(x, weight, Recipe().product("out")).dtype == torch.bfloat16
    logits = linear(x, weight, Recipe().product("gate"))
    assert logits.dtype == torch.float32 and torch.allclose(logits, x.float() @ weight.t(), rtol=1e-6)
    assert linear(x.double(), weight.double(), Recipe().product("gate")).dtype == torch.float64
    linear(x, weight, Recipe().product("out")).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_product_is_the_same(rows: int, dtype: torch.dtype) -> None:
    """Few rows take the native kernel where it is built; the result stays within one rounding of the product."""
    x, weight = leaf(rows, 96, dtype=dtype).detach(), leaf(40, 96, seed=1, dtype=dtype)
    expected = x.double() @ weight.detach().double().t()
    with torch.no_grad():
        actual = linear(x, weight, ENTRY).double()
    bound = (x.double().abs() @ weight.detach().double().abs().t()) * 2.0**-17 + expected.abs() * torch.finfo(dtype).eps
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("counts", [[1, 0, 2], [2, 2, 2], [0, 9, 1]])
@torch.no_grad()
def test_grouped_without_gradients(counts: list[int]) -> None:
    x, weight = leaf(sum(counts), 32, dtype=torch.float32), leaf(3, 16, 32, seed=1, dtype=torch.float32)
    expected = grouped_by_autograd(x.double(), weight.double(), counts)
    assert torch.allclose(grouped_linear(x, weight, counts, ENTRY).double(), expected, atol=1e-4)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(grouped_linear(x, transposed, counts, ENTRY).double(), expected, atol=1e-4)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups of 5 rows do not fit 3 weights and 5 rows"):
        grouped_linear(torch.zeros(5, 2), torch.zeros(3, 4, 2), [2, 3], ENTRY)
    with pytest.raises(ValueError, match="adding up to the rows"):
        grouped_linear(torch.zeros(5, 2), torch.zeros(2, 4, 2), [2, 2], ENTRY)


@pytest.mark.parametrize("rows", [1, 255, 600])
def test_linear_cross_entropy_against_autograd(rows: int) -> None:
    hidden, weight = leaf(rows, 6), leaf(11, 6, seed=1)
    targets = torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(3))
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    gradients = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, ENTRY)
    assert torch.allclose(loss, expected, rtol=1e-12)
    (loss * 0.25).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert torch.allclose(hidden.grad, gradients[0], rtol=1e-10, atol=1e-14)
    assert torch.allclose(weight.grad, gradients[1], rtol=1e-10, atol=1e-14)
    losses, best = token_losses(hidden, weight, targets, ENTRY)
    assert torch.allclose(losses.sum(), expected, rtol=1e-12)
    assert torch.equal(best, (hidden @ weight.t()).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_of_a_target_that_is_all_but_impossible(dtype: torch.dtype) -> None:
    """A probability that underflows has a finite loss, and the gradient of the softmax."""
    hidden, targets = torch.tensor([[900.0], [1.0]], dtype=dtype).requires_grad_(), torch.tensor([1, 1])
    weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets, ENTRY)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss.backward()
    assert hidden.grad is not None and torch.allclose(hidden.grad, gradient, rtol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_gradients_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if native_library() is None:
        pytest.skip("installed without a C++ compiler")
    counts = [33, 0, 2, 65]
    x, weights = leaf(100, 136).to(dtype), leaf(4, 72, 136, seed=1).to(weight_dtype)
    grouped, whole = grouped_linear(x, weights, counts, ENTRY), linear(x, weights[0], ENTRY)
    assert torch.equal(grouped[:33], whole[:33])
    for row in (0, 32, 50, 99):
        assert torch.equal(linear(x[[row]], weights[0], ENTRY)[0], whole[row])
        one = [int(row < 33), 0, 0, int(row >= 35)]
        assert torch.equal(grouped_linear(x[[row]], weights, one, ENTRY)[0], grouped[row])
    for cut in (1, 7, 64):
        assert torch.equal(torch.cat([linear(part, weights[0], ENTRY) for part in x.split(cut)]), whole)
    heads = weights.transpose(1, 2)  # as absorbed attention folds its queries
    folded = grouped_linear(x[:, :72], heads, [25] * 4, ENTRY)
    assert torch.equal(grouped_linear(x[25:26, :72], heads, [0, 1, 0, 0], ENTRY)[0], folded[25])
