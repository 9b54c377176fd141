"""A Linear's three products on quantised operands [V3 section 3.3.1, figure 6].

    Fprop  y  = x Wᵀ    x in 1x128 tiles, W in 128x128 blocks
    Dgrad  dx = dy W    dy in 1x128 tiles, W as in Fprop
    Wgrad  dW = dyᵀ x   both in 128x1 tiles, because it sums over tokens; added up in FP32

Kept for the backward are x's codes, turned into 128x1 tiles when they are needed, and W's.  Quantising is passed
through by the gradient: dx is that of the activation before it was quantised.

Where rows belong to groups (experts), tiles over tokens begin anew with each group, as if it were filled up with zeros.
Where a weight is several matrices in one (gate and up), each has blocks of its own, as a checkpoint stores them.

Legend: T rows, I input features, O output features, E groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels import fp8_gemm
from abyssal.kernels.fp8_tiles import Quantised, quantise, quantise_with_values, round_trip, turn_values
from abyssal.kernels.gemm import try_native
from abyssal.kernels.grouped_gemm import grouped_gemm, grouped_gemm_input, grouped_gemm_weight
from abyssal.kernels.matmul import matmul
from abyssal.precision.operand import Operand, Remade, product_dtype
from abyssal.precision.recipe import ProductFormats
from abyssal.spec.tile_format import TileFormat

_EMPTY = torch.empty(0)
FinishWeight = Callable[[Any, Callable[[], Tensor]], Tensor | None]


def quantised_weight(
    weight: Tensor, formats: ProductFormats, parts: int, dtype: torch.dtype
) -> tuple[Quantised, Tensor]:
    """Codes of the weight's matrices, (..., parts, O / parts, I) where they are more than one, and their values in the
    weight's own shape."""
    if parts == 1:
        return quantise_with_values(weight.detach(), formats.weight, dtype)
    codes, values = quantise_with_values(weight.detach().unflatten(-2, (parts, -1)), formats.weight, dtype)
    return codes, values.flatten(-3, -2)


class Fp8Linear(torch.autograd.Function):
    """The three products; ``counts`` None for one weight (O, I), else one of (E, O, I) for each group of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        handle_TI: Tensor,
        weight: Tensor,
        x: Operand,
        formats: ProductFormats,
        parts: int,
        counts: Sequence[int] | None,
        queue: Any,
        finish_weight: FinishWeight,
    ) -> Tensor:
        codes, values = quantised_weight(weight, formats, parts, product_dtype(handle_TI, formats))
        kept = () if not isinstance(x.kept, Quantised) else (x.kept.codes, x.kept.scales)
        ctx.save_for_backward(codes.codes, codes.scales, *kept)
        ctx.kept = replace(x.kept, codes=_EMPTY, scales=_EMPTY) if isinstance(x.kept, Quantised) else x.kept
        ctx.dtype = handle_TI.dtype
        ctx.weight, ctx.queue, ctx.finish_weight = weight, queue, finish_weight
        ctx.formats, ctx.parts, ctx.counts = formats, parts, counts
        return fprop(x, codes, values, formats, counts).to(handle_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = gradients
        formats, counts, weight = ctx.formats, ctx.counts, ctx.weight
        codes, scales, *kept = ctx.saved_tensors
        dx_TI, dw = None, None
        if ctx.needs_input_grad[0]:
            quantised = Quantised(codes, scales, formats.weight, codes.shape[-1])
            dx_TI = dgrad(dy_TO, quantised, weight.shape, ctx.parts, formats, counts).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            x = replace(ctx.kept, codes=kept[0], scales=kept[1]) if kept else ctx.kept
            dw = ctx.finish_weight(ctx, lambda: wgrad(dy_TO, x, formats, counts))
        return dx_TI, dw, None, None, None, None, None, None


def fprop(
    x: Operand, codes: Quantised, values: Tensor, formats: ProductFormats, counts: Sequence[int] | None
) -> Tensor:
    """y (T, O) in the dtype of the product."""
    if formats.accumulation != "float32":
        dtype = values.dtype
        if counts is None:
            return fp8_gemm.gemm(x.codes, codes, dtype, formats.accumulation)
        return fp8_gemm.grouped_gemm(x.codes, codes, counts, dtype, formats.accumulation)
    return matmul(x.values, values.t()) if counts is None else grouped_gemm(x.values, values, counts)


def dgrad(
    dy_TO: Tensor,
    codes: Quantised,
    weight_shape: torch.Size,
    parts: int,
    formats: ProductFormats,
    counts: Sequence[int] | None,
) -> Tensor:
    """dx (T, I) in the dtype of the product."""
    dtype = product_dtype(dy_TO, formats)
    if formats.accumulation != "float32":
        return _dgrad_adding_up(dy_TO, codes, parts, formats, counts, dtype)
    weight = codes.values(dtype).view(weight_shape)
    dy = gradient_values(dy_TO, formats.gradient, parts, counts, dtype)
    return matmul(dy, weight) if counts is None else grouped_gemm_input(dy, weight, counts)


def wgrad(dy_TO: Tensor, kept: Quantised | Remade, formats: ProductFormats, counts: Sequence[int] | None) -> Tensor:
    """dW, (O, I) or (E, O, I), in FP32."""
    form, groups = formats.turned_input, _tiled(counts, formats.turned_input)
    if formats.accumulation != "float32":
        return _wgrad_adding_up(dy_TO, kept, formats, counts)
    x = turn_values(kept, form, torch.float32, groups) if isinstance(kept, Quantised) else kept(form, groups)
    dy = round_trip(dy_TO, formats.turned_gradient, torch.float32, _tiled(counts, formats.turned_gradient))
    return matmul(dy.t(), x) if counts is None else grouped_gemm_weight(dy, x, counts, torch.float32)


def _dgrad_adding_up(
    dy_TO: Tensor,
    codes: Quantised,
    parts: int,
    formats: ProductFormats,
    counts: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Dgrad on codes, with an accumulation other than FP32."""
    dy = dy_TO if parts == 1 else dy_TO.unflatten(-1, (parts, -1))
    if formats.gradient.tile != "128x128":
        quantised = quantise(dy, formats.gradient)
        if counts is None:
            return fp8_gemm.gemm_input(quantised, codes, dtype, formats.accumulation)
        return fp8_gemm.grouped_gemm_input(quantised, codes, counts, dtype, formats.accumulation)
    weights = [codes] if counts is None else [_group(codes, number) for number in range(len(counts))]
    groups = dy.split([len(dy)] if counts is None else list(counts))
    blocks = [quantise(group if parts == 1 else group.transpose(0, 1), formats.gradient) for group in groups]
    products = zip(blocks, weights, strict=True)
    return torch.cat([fp8_gemm.gemm_input(*operands, dtype, formats.accumulation) for operands in products])


def _group(stacked: Quantised, number: int) -> Quantised:
    """One group's matrices; a scale of the whole tensor is everyone's."""
    scales = stacked.scales if stacked.scales.ndim == 0 else stacked.scales[number]
    return replace(stacked, codes=stacked.codes[number], scales=scales)


def _wgrad_adding_up(
    dy_TO: Tensor, kept: Quantised | Remade, formats: ProductFormats, counts: Sequence[int] | None
) -> Tensor:
    """Wgrad on codes, with an accumulation other than FP32."""
    form, groups = formats.turned_input, _tiled(counts, formats.turned_input)
    values = kept.values() if isinstance(kept, Quantised) else kept(form, groups)
    x = quantise(values, form, groups)  # what was made again in these tiles has its own codes in them
    dy = quantise(dy_TO, formats.turned_gradient, _tiled(counts, formats.turned_gradient))
    if counts is None:
        return fp8_gemm.gemm_weight(dy, x, formats.accumulation)
    return fp8_gemm.grouped_gemm_weight(dy, x, counts, formats.accumulation)


def _tiled(counts: Sequence[int] | None, form: TileFormat) -> Sequence[int] | None:
    """The groups with which tiles over rows begin anew; one scale for a tensor knows none."""
    return counts if form.tile == "128x1" else None


def gradient_values(
    dy_TO: Tensor, form: TileFormat, parts: int, counts: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """dy (T, O) as Dgrad reads it: the columns of each of ``parts`` matrices have tiles of their own."""
    if form.tile != "128x128":
        return round_trip(dy_TO.unflatten(-1, (parts, -1)), form, dtype).flatten(1)
    groups = dy_TO.split([len(dy_TO)] if counts is None else list(counts))
    blocks = [round_trip(group.unflatten(-1, (parts, -1)).transpose(0, 1), form, dtype) for group in groups]
    return torch.cat([block.transpose(0, 1).flatten(1) for block in blocks])


def inference_product(
    x: Operand, weight: Tensor, formats: ProductFormats, parts: int, counts: Sequence[int] | None
) -> Tensor:
    """y (T, O) without gradients: on CPU a row's result does not depend on the other rows."""
    codes, values = quantised_weight(weight, formats, parts, x.values.dtype)
    y_TO = try_native(x.values, values, counts, x.handle.dtype)
    return fprop(x, codes, values, formats, counts).to(x.handle.dtype) if y_TO is None else y_TO
