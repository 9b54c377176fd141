"""A Linear's three products in FP8: what is quantised how, kept, and split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, round_trip
from abyssal.precision.linear import Linear, WeightQueue, grouped_linear, linear
from abyssal.precision.operand import Operand, operand
from abyssal.precision.recipe import Fp8Options, LinearEntry, ProductFormats, fp8_recipe


def entry_of(options: Fp8Options | None = None) -> tuple[LinearEntry, ProductFormats]:
    """Of any Linear, and its formats."""
    entry = fp8_recipe(options).product("q_a")
    assert entry.fp8 is not None
    return entry, entry.fp8


ENTRY, FORMATS = entry_of()


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp() * scale
    return values.to(dtype).requires_grad_()


def close(got: Tensor | None, wanted: Tensor) -> bool:
    """Equal but for sums in another order, and the rounding of a BF16 result."""
    assert got is not None and got.shape == wanted.shape
    bound = 2.0**-8 if got.dtype is torch.bfloat16 else 2.0**-18
    return float((got.double() - wanted).abs().max()) <= bound * float(wanted.abs().max().clamp(min=1e-30))


def by_hand(x: Tensor, weight: Tensor, dy: Tensor, formats: ProductFormats, parts: int) -> tuple[Tensor, ...]:
    """y, dx and dW of one matrix in FP64, from the values of the tiles that the recipe names."""
    matrices = weight.detach().unflatten(0, (parts, -1))
    w = round_trip(matrices, formats.weight, torch.float64).flatten(0, 1)
    x_rows = round_trip(x.detach(), formats.input, torch.float64)
    gradient = dy.unflatten(1, (parts, -1))
    if formats.gradient.tile == "128x128":
        gradient = gradient.transpose(0, 1)
    dy_rows = round_trip(gradient, formats.gradient, torch.float64)
    if formats.gradient.tile == "128x128":
        dy_rows = dy_rows.transpose(0, 1)
    x_columns = round_trip(round_trip(x.detach(), formats.kept, torch.float32), formats.turned_input, torch.float64)
    dy_columns = round_trip(dy, formats.turned_gradient, torch.float64)
    return x_rows @ w.t(), dy_rows.flatten(1) @ w, dy_columns.t() @ x_columns


OPTIONS = [
    Fp8Options(),
    Fp8Options(scales="float32"),
    Fp8Options(gradients="e5m2"),
    Fp8Options(gradient_tile="128x128"),
    Fp8Options(granularity="tensor"),
]


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=lambda options: "-".join(
        map(str, (options.scales, options.gradients, options.gradient_tile, options.granularity))
    ),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_products_are_those_of_the_tiles(options: Fp8Options, dtype: torch.dtype, parts: int) -> None:
    entry, formats = entry_of(options)
    x, weight = leaf(200, 150, seed=0, dtype=dtype), leaf(2 * 90, 150, seed=1)
    dy = leaf(200, 2 * 90, seed=2, dtype=dtype, scale=1e-4).detach()
    y = linear(x, weight, entry, parts=parts)
    y.backward(dy)
    wanted = by_hand(x, weight, dy, formats, parts)
    assert y.dtype is dtype and x.grad is not None and x.grad.dtype is dtype
    assert weight.grad is not None and weight.grad.dtype is torch.float32
    assert all(close(got, want) for got, want in zip((y.detach(), x.grad, weight.grad), wanted, strict=True))
    with torch.no_grad():
        assert close(linear(x, weight, entry, parts=parts), wanted[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.booleans(), st.sampled_from([1, 2]))
def test_a_group_is_as_if_it_were_alone(counts: list[int], split: bool, parts: int) -> None:
    x, weight = leaf(sum(counts), 130, seed=0), leaf(len(counts), 40, 130, seed=1)
    dy = leaf(sum(counts), 40, seed=2).detach()
    queue = WeightQueue() if split else None
    y = grouped_linear(x, weight, counts, ENTRY, queue, parts)
    y.backward(dy)
    if queue is not None:
        assert weight.grad is None
        queue.run()
    assert x.grad is not None and weight.grad is not None
    segments = zip(x.detach().split(counts), dy.split(counts), y.split(counts), x.grad.split(counts), strict=True)
    for number, (x_e, dy_e, y_e, dx_e) in enumerate(segments):
        if not len(x_e):
            assert not weight.grad[number].any()
            continue
        wanted = by_hand(x_e, weight[number], dy_e, FORMATS, parts)
        got = y_e.detach(), dx_e, weight.grad[number]
        assert all(close(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "options", [*OPTIONS, Fp8Options(accumulation="promoted"), Fp8Options(accumulation="tensor_core")], ids=str
)
def test_blocks_on_gradients_and_every_accumulation_group_by_group(options: Fp8Options) -> None:
    """Grouped, each group is the single product of its rows, in FP8 of every kind but one scale for all."""
    entry, counts = fp8_recipe(options).product("q_a"), [130, 0, 3]
    if options.granularity == "tensor":
        pytest.skip("one scale for all rows is not one for each group's")
    x, weight = leaf(133, 140, seed=0), leaf(3, 60, 140, seed=1)
    dy = leaf(133, 60, seed=2).detach()
    dy[130:] *= 1000  # the last group's would leave little of the first's in a block with them
    grouped_linear(x, weight, counts, entry, parts=2).backward(dy)
    assert x.grad is not None and weight.grad is not None
    parts = zip(x.detach().split(counts), dy.split(counts), weight, x.grad.split(counts), weight.grad, strict=True)
    for x_e, dy_e, weight_e, dx_e, dw_e in parts:
        if len(x_e):
            alone, own = x_e.clone().requires_grad_(), weight_e.detach().clone().requires_grad_()
            linear(alone, own, entry, parts=2).backward(dy_e)
            assert close(dx_e, alone.grad.double()) and close(dw_e, own.grad.double())  # type: ignore[union-attr]


def test_emulated_accumulation_is_less_exact_without_promotion() -> None:
    errors = {}
    x, weight = leaf(32, 2048, seed=0), leaf(48, 2048, seed=1)
    for accumulation in ("float32", "promoted", "tensor_core"):
        entry, formats = entry_of(Fp8Options(accumulation=accumulation))  # type: ignore[arg-type]
        y = linear(x, weight, entry).detach().double()
        wanted = by_hand(x, weight, torch.zeros(32, 48), formats, 1)[0]
        errors[accumulation] = float((y - wanted).abs().max() / wanted.abs().max())
    assert errors["float32"] < 1e-6 < errors["promoted"] < errors["tensor_core"] < 0.02


def test_an_operand_is_quantised_once_and_keeps_codes_alone() -> None:
    x, weights = leaf(64, 256, seed=0, dtype=torch.bfloat16), [leaf(32, 256, seed=seed) for seed in (1, 2)]
    saved: list[Tensor] = []
    once = operand(x, ENTRY)
    assert isinstance(once, Operand) and operand(once, ENTRY) is once
    assert isinstance(once.kept, Quantised)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = sum(linear(once, weight, ENTRY) for weight in weights)
    own = {once.kept.codes.data_ptr(), once.kept.scales.data_ptr()}
    activations = [tensor for tensor in saved if tensor.shape[0] == 64]
    assert len(activations) == 4 and {tensor.data_ptr() for tensor in activations} == own
    assert not any(tensor.dtype in (torch.bfloat16, torch.float32) for tensor in saved)
    assert isinstance(y, Tensor)
    y.float().sum().backward()
    assert x.grad is not None


def test_what_is_kept_may_be_finer_than_what_is_multiplied() -> None:
    """E5M6 after attention: Fprop reads E4M3, Wgrad what E5M6 comes to in tiles over tokens."""
    formats = replace(FORMATS, kept=replace(FORMATS.kept, code="e5m6"))
    x, weight, dy = leaf(140, 256, seed=0), leaf(64, 256, seed=1), leaf(140, 64, seed=2).detach()
    linear(x, weight, LinearEntry(fp8=formats)).backward(dy)
    wanted = by_hand(x, weight, dy, formats, 1)
    assert close(weight.grad, wanted[2]) and close(x.grad, wanted[1])
    assert not close(weight.grad, by_hand(x, weight, dy, FORMATS, 1)[2])


def test_a_tile_that_is_not_finite_reaches_the_output_and_its_gradients() -> None:
    x, weight = leaf(3, 256, seed=0), leaf(8, 256, seed=1)
    with torch.no_grad():
        x[1, 200] = float("inf")
    y = linear(x, weight, ENTRY)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    y.sum().backward()
    assert weight.grad is not None and weight.grad[:, 128:].isnan().any() and weight.grad[:, :128].isfinite().any()
    made = operand(x, ENTRY)
    assert isinstance(made, Operand) and made.codes.bad_tiles() == 1


def test_a_row_does_not_depend_on_the_others_without_gradients() -> None:
    layer = Linear(256, 96, ENTRY)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(3))
    x = leaf(40, 256, seed=0, dtype=torch.bfloat16).detach()
    with torch.no_grad():
        together = layer(x)
        assert all(torch.equal(layer(x[row : row + 1])[0], together[row]) for row in (0, 17, 39))


def test_the_effective_weight_is_what_is_multiplied_by() -> None:
    layer = Linear(256, 96, ENTRY, parts=2)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(3))
    x = leaf(5, 256, seed=0).detach()
    made = operand(x, ENTRY)
    assert isinstance(made, Operand)
    assert close(layer(x).detach(), made.values.double() @ layer.effective_weight().double().t())
    assert not torch.equal(layer.effective_weight(), layer.weight)
