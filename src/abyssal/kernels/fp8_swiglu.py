"""SwiGLU between quantised products: its input kept in FP8, its output made in FP8, both ways [V3 sections 3.2.3, 3.3].

Between the two products of an expert lie h = silu(gate) · up · w and its quantisation.  What is kept for the backward
is the input [gate; up] in ``1x128`` tiles; h is made again from it there.  One rule says what the bytes are: SwiGLU and
its gradients are those of :mod:`~abyssal.kernels.swiglu`, rounded to the activations' dtype as if they were stored, and
then quantised.  So fusing changes the speed and no byte.  The forward's h is that of the exact input, and the
backward's that of the kept one, which is where their values differ.

The two halves of the input are quantised as two matrices, as the products before them and the checkpoint see them: a
tile never holds values of both.

Legend: T rows (tokens sorted by expert), F hidden width, ``2F`` the columns [gate; up], ``_T_2_F`` the same as halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, quantise, quantise_with_values, round_trip
from abyssal.kernels.swiglu import swiglu, swiglu_backward
from abyssal.spec.tile_format import TileFormat


def swiglu_quantised(
    gate_up_T2F: Tensor, weights_T: Tensor | None, kept: TileFormat, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Quantised, Tensor]:
    """The forward: what is kept of the input (T, 2, F) in ``kept``; h (T, F) in ``form``; and h's values in ``dtype``.

    Both formats have ``1x128`` tiles.  ``weights_T`` are routing weights, or None.
    """
    h_TF = swiglu(gate_up_T2F, weights_T)
    return quantise(_halves(gate_up_T2F), kept), *quantise_with_values(h_TF, form, dtype)


def swiglu_again(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    activation: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(T, F): the values in ``form`` of h made from what was kept; ``counts`` are the groups of ``128x1`` tiles, and
    ``activation`` the dtype of the input before it was kept."""
    return round_trip(swiglu(kept_T_2_F.values(activation).flatten(-2), weights_T), form, dtype, counts)


def swiglu_gradients(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    dh_TF: Tensor,
    by_row: TileFormat,
    by_column: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The backward from what was kept and the gradient of h.

    Returns:
        The input's gradient (T, 2F) as its values in ``by_row``, which the input gradient of the product before reads,
        and in ``by_column``, which its weight gradient reads (``1x128`` tiles within each half, and ``128x1`` in the
        groups of ``counts``); and the gradient (T,) of the weights, in their dtype.
    """
    gate_up_T2F = kept_T_2_F.values(dh_TF.dtype).flatten(-2)
    dgate_up_T2F, dweights_T = swiglu_backward(gate_up_T2F, weights_T, dh_TF)
    rows_T2F = round_trip(_halves(dgate_up_T2F), by_row, dtype).flatten(-2)
    return rows_T2F, round_trip(dgate_up_T2F, by_column, dtype, counts), dweights_T


def _halves(gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.unflatten(-1, (2, -1))
