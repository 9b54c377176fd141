"""Every matrix product of the model, with input and weight gradients that can be taken apart.

``linear`` and ``grouped_linear`` are the only doors to a weight: a format (FP8), a native kernel or a schedule that
splits the backward (ZeroBubble, DualPipe [V3 section 3.2.1]) arrives here and the model does not change.

The backward of a product y = x Wᵀ has two halves that do not need each other: dx = dy W, which the layer below waits
for, and dW = dyᵀ x, which nobody waits for.  Without a queue both run at once, as autograd would.  With a
:class:`WeightQueue` the second half is put off as a closure and adds to ``weight.grad`` when the schedule runs it.

Without gradients on CPU both are the row-invariant product of ``kernels/gemm.py``: what a token gets does not depend on
the batch that it is in.  Training keeps torch's products, whose last bits depend on the number of rows.

A parameter may be FP32 while activations are BF16: the cast is made here, once a product, and costs a few percent of a
step at the sizes one machine trains.  Or it may be in BF16 already, with its FP32 master elsewhere
(``parallel/zero.py``): the product is the same to the bit, and the gradient is in what the parameter's ``grad_dtype``
says.

Legend: T tokens or rows, I input features, O output features, E groups (experts).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.kernels.gemm import try_native
from abyssal.kernels.grouped_gemm import grouped_gemm, grouped_gemm_input, grouped_gemm_weight
from abyssal.kernels.matmul import matmul
from abyssal.precision.fp8_linear import Fp8Linear, inference_product, quantised_weight
from abyssal.precision.operand import Activation, Operand, kept_source, operand, plain
from abyssal.precision.recipe import LinearEntry


class WeightQueue:
    """Weight gradients put off until a schedule asks for them, first in, first out."""

    def __init__(self) -> None:
        self._closures: deque[Callable[[], None]] = deque()

    def put(self, closure: Callable[[], None]) -> None:
        self._closures.append(closure)

    def take(self) -> list[Callable[[], None]]:
        """Hand over all closures and forget them: the caller runs each once."""
        closures = list(self._closures)
        self._closures.clear()
        return closures

    @torch.no_grad()
    def run(self) -> None:
        """Compute every gradient in the queue and add it to its parameter's ``grad``."""
        for closure in self.take():
            closure()

    def __len__(self) -> int:
        return len(self._closures)


def operand_dtype(x: Tensor, entry: LinearEntry) -> torch.dtype:
    """The dtype in which a product with activation ``x`` is computed under ``entry``."""
    if entry.operands == "float32":
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; the check is cheaper than a cast that does nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _inference_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` as the native product reads it: in ``dtype``, or in BF16, which it widens as it reads."""
    return weight if weight.dtype is torch.bfloat16 and dtype is torch.float32 else _cast(weight, dtype)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """What the gradient of ``weight`` is kept in: its own dtype, unless a parameter says otherwise."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


def accumulate_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add ``gradient`` to ``parameter.grad``."""
    gradient = gradient.to(gradient_dtype(parameter))
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _finish_weight(ctx: Any, compute: Callable[[], Tensor]) -> Tensor | None:
    """The weight gradient now, or nothing now and a closure in the queue.

    A view of a parameter (absorbed latent attention has two) does not wait: autograd alone knows the way back to it.
    """
    weight: Tensor = ctx.weight
    if ctx.queue is None or not weight.is_leaf:
        return compute().to(gradient_dtype(weight))
    ctx.queue.put(lambda: accumulate_gradient(weight, compute()))
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype, queue: WeightQueue | None) -> Tensor:
        operand_OI = weight_OI.to(dtype)
        ctx.save_for_backward(x_TI, operand_OI)  # the input as it came: a copy in another dtype is made again
        ctx.weight, ctx.queue = weight_OI, queue
        return matmul(x_TI.to(dtype), operand_OI.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = gradients
        x_TI, weight_OI = ctx.saved_tensors
        dx_TI = matmul(dy_TO, weight_OI).to(x_TI.dtype) if ctx.needs_input_grad[0] else None
        dw_OI = (
            _finish_weight(ctx, lambda: matmul(dy_TO.t(), x_TI.to(dy_TO.dtype))) if ctx.needs_input_grad[1] else None
        )
        return dx_TI, dw_OI, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_EOI: Tensor,
        counts: Sequence[int],
        dtype: torch.dtype,
        queue: WeightQueue | None,
    ) -> Tensor:
        operand_EOI = weight_EOI.to(dtype)
        ctx.save_for_backward(x_TI, operand_EOI)
        ctx.weight, ctx.queue, ctx.counts = weight_EOI, queue, counts
        return grouped_gemm(x_TI.to(dtype), operand_EOI, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = gradients
        x_TI, weight_EOI = ctx.saved_tensors
        counts, weight = ctx.counts, ctx.weight
        dx_TI, dw_EOI = None, None
        if ctx.needs_input_grad[0]:
            dx_TI = grouped_gemm_input(dy_TO, weight_EOI, counts).to(x_TI.dtype)
        if ctx.needs_input_grad[1]:
            wide = gradient_dtype(weight)
            dw_EOI = _finish_weight(ctx, lambda: grouped_gemm_weight(dy_TO, x_TI.to(dy_TO.dtype), counts, wide))
        return dx_TI, dw_EOI, None, None, None


def linear(
    x_TI: Activation, weight_OI: Tensor, entry: LinearEntry, queue: WeightQueue | None = None, parts: int = 1
) -> Tensor:
    """y_TO = x_TI weight_OIᵀ, in the operand dtype of ``entry``, or on operands quantised as it says.

    Args:
        x_TI: activations, rows by input features; quantised here unless they are an operand already.
        weight_OI: weight; cast to the operand dtype when it differs.
        entry: the recipe's entry for this product.
        queue: where the weight gradient is put off to; None computes it in the backward.
        parts: matrices that the weight's rows are, which are quantised each by itself.

    Error bound: that of one matrix product accumulated in FP32 (FP64 for FP64 operands), rounded once; quantised, of
    the product of the operands' values.
    """
    if entry.fp8 is not None:
        return _fp8_product(operand(x_TI, entry), weight_OI, entry, None, queue, parts)
    x_TI = plain(x_TI)
    dtype = operand_dtype(x_TI, entry)
    if torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad):
        return _Linear.apply(x_TI, weight_OI, dtype, queue)  # type: ignore[no-any-return]
    operand_TI, operand_OI = _cast(x_TI, dtype), _inference_weight(weight_OI, dtype)
    y_TO = try_native(operand_TI, operand_OI, None, dtype)
    return matmul(operand_TI, _cast(operand_OI, dtype).t()) if y_TO is None else y_TO


def grouped_linear(
    x_TI: Activation,
    weight_EOI: Tensor,
    counts: Sequence[int],
    entry: LinearEntry,
    queue: WeightQueue | None = None,
    parts: int = 1,
) -> Tensor:
    """One product a group: rows of group e times weight_EOI[e]ᵀ.

    Args:
        x_TI: rows sorted by group.
        weight_EOI: one weight a group.
        counts: rows of each group, in order; their sum is T.  Groups may be empty.
        entry, queue, parts: as in :func:`linear`.

    Raises:
        ValueError: counts that do not fit the weight or the rows.
    """
    if len(counts) != weight_EOI.shape[0] or sum(counts) != len(x_TI):
        raise ValueError(
            f"counts: {len(counts)} groups of {sum(counts)} rows do not fit {weight_EOI.shape[0]} weights "
            f"and {len(x_TI)} rows; pass one count a group, adding up to the rows"
        )
    if entry.fp8 is not None:
        return _fp8_product(operand(x_TI, entry), weight_EOI, entry, counts, queue, parts)
    x_TI = plain(x_TI)
    dtype = operand_dtype(x_TI, entry)
    if torch.is_grad_enabled() and (x_TI.requires_grad or weight_EOI.requires_grad):
        return _GroupedLinear.apply(x_TI, weight_EOI, counts, dtype, queue)  # type: ignore[no-any-return]
    operand_TI, operand_EOI = _cast(x_TI, dtype), _inference_weight(weight_EOI, dtype)
    y_TO = try_native(operand_TI, operand_EOI, counts, dtype)
    return grouped_gemm(operand_TI, _cast(operand_EOI, dtype), counts) if y_TO is None else y_TO


def _fp8_product(
    x: Activation,
    weight: Tensor,
    entry: LinearEntry,
    counts: Sequence[int] | None,
    queue: WeightQueue | None,
    parts: int,
) -> Tensor:
    assert isinstance(x, Operand) and entry.fp8 is not None
    if torch.is_grad_enabled() and (x.handle.requires_grad or weight.requires_grad):
        return Fp8Linear.apply(x.handle, weight, x, entry.fp8, parts, counts, queue, _finish_weight)  # type: ignore[no-any-return]
    return inference_product(x, weight, entry.fp8, parts, counts)


class Linear(nn.Module):
    """A weight and its recipe entry.  ``forward`` takes flat rows; leading axes beyond one are not accepted."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        entry: LinearEntry,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.entry = entry
        self.parts = parts

    def forward(self, x_TI: Activation, queue: WeightQueue | None = None) -> Tensor:
        return linear(x_TI, self.weight, self.entry, queue, self.parts)

    def source(self, x_TI: Activation) -> Callable[[], Activation]:
        """What gives ``x_TI``, which went into ``forward``, once more, from no more than the backward keeps of it."""
        return kept_source(x_TI)

    def effective_weight(self) -> Tensor:
        """The matrix (O, I) that ``forward`` multiplies by: an adapter's part in it, rounded as it is quantised."""
        if self.entry.fp8 is None:
            return self.weight
        return quantised_weight(self.weight, self.entry.fp8, self.parts, self.weight.dtype)[1]
