"""SwiGLU whose input is kept quantised, and whose output is not kept at all [V3 section 3.3.3].

The forward computes with the input as it came.  The backward has its codes: it reads the gradient of SwiGLU from their
values, and the output that the weight gradient of the next product needs is computed from them once more, a little
other than it was.  That is the recipe's price for a quarter of the memory.

Legend: T rows, F hidden width; the input's columns are [gate; up], and each half has tiles of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.fp8_swiglu import swiglu_again, swiglu_quantised
from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.kernels.swiglu import swiglu, swiglu_backward
from abyssal.precision.operand import Activation, Operand, operand, values_dtype
from abyssal.precision.recipe import LinearEntry, ProductFormats
from abyssal.spec.tile_format import TileFormat


class _Backward(torch.autograd.Function):
    """``h_TF``, which was made from the other arguments, with the backward of SwiGLU from what was kept."""

    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor, weights_T: Tensor | None, h_TF: Tensor, kept: Quantised) -> Tensor:
        ctx.save_for_backward(kept.codes, kept.scales, weights_T)
        ctx.form, ctx.columns, ctx.dtype = kept.form, kept.columns, gate_up_T2F.dtype
        return h_TF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, weights_T = ctx.saved_tensors
        gate_up_T2F = Quantised(codes, scales, ctx.form, ctx.columns).values(ctx.dtype).flatten(1)
        return *swiglu_backward(gate_up_T2F, weights_T, gradients[0]), None, None


def kept_swiglu(
    gate_up_T2F: Tensor, weights_T: Tensor | None, form: TileFormat, entry: LinearEntry
) -> tuple[Activation, Callable[[], Tensor] | None]:
    """silu(gate) · up, times each row's weight, as the next product reads it.

    Args:
        form: what is kept of the input, in 1x128 tiles.
        entry: of the product that comes next.

    Returns:
        The result; and, where it is no operand that makes itself again, what makes its values again.
    """
    if not torch.is_grad_enabled():
        return operand(swiglu(gate_up_T2F, weights_T), entry), None
    if entry.fp8 is not None:
        return _quantised(gate_up_T2F, weights_T, form, entry.fp8), None
    kept = quantise(gate_up_T2F.detach().unflatten(-1, (2, -1)), form)
    detached = gate_up_T2F.detach(), None if weights_T is None else weights_T.detach()
    h_TF = _Backward.apply(gate_up_T2F, weights_T, swiglu(*detached), kept)
    weights, dtype = detached[1], gate_up_T2F.dtype
    return h_TF, lambda: swiglu(kept.values(dtype).flatten(1), weights)


def _quantised(gate_up_T2F: Tensor, weights_T: Tensor | None, form: TileFormat, formats: ProductFormats) -> Operand:
    detached, weights = gate_up_T2F.detach(), None if weights_T is None else weights_T.detach()
    activation = gate_up_T2F.dtype
    dtype = values_dtype(activation, formats.input, formats.weight, formats.gradient)
    kept, codes, values = swiglu_quantised(detached, weights, form, formats.input, dtype)
    handle = _Backward.apply(gate_up_T2F, weights_T, values.to(gate_up_T2F.dtype), kept)

    def again(turned: TileFormat, counts: Sequence[int] | None) -> Tensor:
        return swiglu_again(kept, weights, turned, torch.float32, counts, activation)

    return Operand(handle, codes, values, again)
