"""Grouped matrix products: one weight a group of consecutive rows, as the experts of a mixture need them.

Three forms, as a forward and its two gradients need them (contiguous by group; K-grouped for the weight).  The loop
over groups is the definition and, on CPU, also the fastest form measured: each product writes straight into its slice
of one output, so nothing is padded and no full-size zero gradient is made for each group.

Legend: T rows sorted by group, I input features, O output features, E groups.
Error bound: each row or weight is one product accumulated in FP32 (FP64 for FP64), rounded once to the output dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from abyssal.kernels.matmul import matmul


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, with its rows."""
    start = 0
    for group, count in enumerate(counts):
        if count:
            yield group, slice(start, start + count)
        start += count


def grouped_gemm(x_TI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """y_TO: rows of group e times weight_EOI[e]ᵀ (Fprop).  Equal groups (heads) go as one batched product."""
    if min(counts) == max(counts) > 0:
        x_EGI = x_TI.view(len(counts), counts[0], -1)
        return matmul(x_EGI, weight_EOI.transpose(1, 2)).flatten(0, 1)
    y_TO = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
    for group, rows in _segments(counts):
        matmul(x_TI[rows], weight_EOI[group].t(), out=y_TO[rows])
    return y_TO


def grouped_gemm_input(dy_TO: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """dx_TI: rows of group e times weight_EOI[e] (Dgrad)."""
    dx_TI = dy_TO.new_empty(dy_TO.shape[0], weight_EOI.shape[2])
    for group, rows in _segments(counts):
        matmul(dy_TO[rows], weight_EOI[group], out=dx_TI[rows])
    return dx_TI


def grouped_gemm_weight(dy_TO: Tensor, x_TI: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """dw_EOI: dyᵀ x over the rows of each group, in ``dtype`` (Wgrad); zero for a group without rows."""
    dw_EOI = torch.empty(len(counts), dy_TO.shape[1], x_TI.shape[1], device=x_TI.device, dtype=dtype)
    seen = set()
    for group, rows in _segments(counts):
        seen.add(group)
        if dtype == x_TI.dtype:
            matmul(dy_TO[rows].t(), x_TI[rows], out=dw_EOI[group])
        else:
            dw_EOI[group] = matmul(dy_TO[rows].t(), x_TI[rows])
    for group in set(range(len(counts))) - seen:
        dw_EOI[group].zero_()
    return dw_EOI
