"""SwiGLU between quantised products: its input kept in FP8, its output made in FP8, both ways [V3 sections 3.2.3, 3.3].

Between the two products of an expert lie h = silu(gate) · up · w and its quantisation.  What is kept for the backward
is the input [gate; up] in ``1x128`` tiles; h is made again from it there.  One rule says what the bytes are: SwiGLU and
its gradients are those of :mod:`~abyssal.kernels.swiglu`, rounded to the activations' dtype as if they were stored, and
then quantised.  So fusing changes the speed and no byte.  The forward's h is that of the exact input, and the
backward's that of the kept one, which is where their values differ.

The two halves of the input are quantised as two matrices, as the products before them and the checkpoint see them: a
tile never holds values of both.

The model calls the forward, and h made again.  Its gradients travel the graph in the activations' dtype and are
quantised by the product that reads them, to the same bytes.  Each function is one pass in C++ (``csrc/fp8_swiglu.cpp``,
and ``csrc/fp8_tiles.cpp`` for h made again) with the bytes of the composition, which runs where the C++ does not apply.

Legend: T rows (tokens sorted by expert), F hidden width, ``2F`` the columns [gate; up], ``_T_2_F`` the same as halves.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.kernels import fp8_tiles_native as tiles
from abyssal.kernels.fp8_tiles import Quantised, quantise, quantise_with_values, round_trip
from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork
from abyssal.kernels.swiglu import swiglu, swiglu_backward
from abyssal.spec.tile_format import TileFormat

_pack = struct.Struct("=20q").pack  # the record `Arguments` of csrc/fp8_swiglu.cpp
_pack_gradients = struct.Struct("=23q").pack  # its `GradientArguments`


def swiglu_quantised(
    gate_up_T2F: Tensor, weights_T: Tensor | None, kept: TileFormat, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Quantised, Tensor]:
    """The forward: what is kept of the input (T, 2, F) in ``kept``; h (T, F) in ``form``; and h's values in ``dtype``.

    Both formats have ``1x128`` tiles.  ``weights_T`` are routing weights, or None.
    """
    found = native_forward(gate_up_T2F, weights_T, kept, form, dtype)
    return composed_forward(gate_up_T2F, weights_T, kept, form, dtype) if found is None else found


def swiglu_again(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    activation: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(T, F): the values in ``form`` of h made from what was kept; ``counts`` are the groups of ``128x1`` tiles, and
    ``activation`` is the dtype that h is rounded to before."""
    parts = kept_T_2_F.codes, kept_T_2_F.scales, kept_T_2_F.form, kept_T_2_F.columns
    found = tiles.swiglu_turned(*parts, weights_T, activation, form, dtype, counts)
    return composed_again(kept_T_2_F, weights_T, form, dtype, counts, activation) if found is None else found


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
    found = native_gradients(kept_T_2_F, weights_T, dh_TF, by_row, by_column, dtype, counts)
    if found is None:
        return composed_gradients(kept_T_2_F, weights_T, dh_TF, by_row, by_column, dtype, counts)
    return found


@torch.no_grad()
def composed_forward(
    gate_up_T2F: Tensor, weights_T: Tensor | None, kept: TileFormat, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Quantised, Tensor]:
    """The definition of :func:`swiglu_quantised`."""
    h_TF = swiglu(gate_up_T2F, weights_T)
    return quantise(_halves(gate_up_T2F), kept), *quantise_with_values(h_TF, form, dtype)


@torch.no_grad()
def composed_again(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    activation: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The definition of :func:`swiglu_again`."""
    h_TF = swiglu(kept_T_2_F.values().flatten(-2), _wide(weights_T)).to(activation)
    return round_trip(h_TF, form, dtype, counts)


@torch.no_grad()
def composed_gradients(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    dh_TF: Tensor,
    by_row: TileFormat,
    by_column: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition of :func:`swiglu_gradients`."""
    gate_up_T2F = kept_T_2_F.values().flatten(-2)
    dgate_up_T2F, dweights_T = swiglu_backward(gate_up_T2F, _wide(weights_T), dh_TF.float())
    dgate_up_T2F = dgate_up_T2F.to(dh_TF.dtype)
    rows_T2F = round_trip(_halves(dgate_up_T2F), by_row, dtype).flatten(-2)
    columns_T2F = round_trip(dgate_up_T2F, by_column, dtype, counts)
    if weights_T is None or dweights_T is None:
        return rows_T2F, columns_T2F, None
    return rows_T2F, columns_T2F, dweights_T.to(weights_T.dtype)


def native_forward(
    gate_up_T2F: Tensor,
    weights_T: Tensor | None,
    kept: TileFormat,
    form: TileFormat,
    dtype: torch.dtype,
    *,
    isa_limit: int = -1,
) -> tuple[Quantised, Quantised, Tensor] | None:
    """:func:`swiglu_quantised` in C++; None where it does not apply.

    It takes CPU tensors in FP32 or BF16 (input and weights each), and rows of contiguous values.
    """
    library, code = native_library(), DTYPE_CODES.get(gate_up_T2F.dtype)
    if library is None or code is None or dtype not in DTYPE_CODES or not gate_up_T2F.is_cpu or gate_up_T2F.ndim != 2:
        return None
    (rows, columns), (stride, unit) = gate_up_T2F.shape, gate_up_T2F.stride()
    if unit != 1 or columns % 2 or not _are_weights(weights_T, rows):
        return None
    if kept.tile != "1x128" or form.tile != "1x128":
        return None
    weights_T = None if weights_T is None else weights_T.contiguous()
    width = columns // 2
    kept_codes, kept_scales = tiles.empty_tiles((rows, 2, width), kept)
    codes, scales = tiles.empty_tiles((rows, width), form)
    values = torch.empty(rows, width, dtype=dtype)
    record = _pack(
        gate_up_T2F.data_ptr(),
        0 if weights_T is None else weights_T.data_ptr(),
        *(part.data_ptr() for part in (kept_codes, kept_scales, codes, scales, values)),
        code,
        0 if weights_T is None else DTYPE_CODES[weights_T.dtype],
        DTYPE_CODES[dtype],
        *tiles.format_codes(kept),
        *tiles.format_codes(form),
        rows,
        width,
        stride,
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    if library.abyssal_fp8_swiglu(record) != OK:
        return None
    return Quantised(kept_codes, kept_scales, kept, width), Quantised(codes, scales, form, width), values


def native_gradients(
    kept_T_2_F: Quantised,
    weights_T: Tensor | None,
    dh_TF: Tensor,
    by_row: TileFormat,
    by_column: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    *,
    isa_limit: int = -1,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """:func:`swiglu_gradients` in C++; None where it does not apply, as in :func:`native_forward`."""
    library, code = native_library(), DTYPE_CODES.get(dh_TF.dtype)
    if library is None or code is None or dtype not in DTYPE_CODES or not dh_TF.is_cpu:
        return None
    rows, width = len(dh_TF), kept_T_2_F.columns
    codes, scales = kept_T_2_F.codes, kept_T_2_F.scales
    if dh_TF.shape != (rows, width) or codes.shape[:-1] != (rows, 2) or not _are_weights(weights_T, rows):
        return None
    if by_row.tile != "1x128" or by_column.tile != "128x1" or not tiles.is_kept(codes, scales, kept_T_2_F.form, width):
        return None
    codes, scales, dh_TF = codes.contiguous(), scales.contiguous(), dh_TF.contiguous()
    weights_T = None if weights_T is None else weights_T.contiguous()
    rows_T2F, columns_T2F = torch.empty(rows, 2 * width, dtype=dtype), torch.empty(rows, 2 * width, dtype=dtype)
    dweights_T = None if weights_T is None else torch.empty(rows)
    groups = None if counts is None else array("q", counts)
    tensors = codes, scales, weights_T, dh_TF, rows_T2F, columns_T2F, dweights_T
    record = _pack_gradients(
        *(0 if part is None else part.data_ptr() for part in tensors),
        0 if groups is None else groups.buffer_info()[0],
        code,
        0 if weights_T is None else DTYPE_CODES[weights_T.dtype],
        DTYPE_CODES[dtype],
        *tiles.format_codes(kept_T_2_F.form),
        *tiles.format_codes(by_row),
        *tiles.format_codes(by_column),
        rows,
        width,
        0 if groups is None else len(groups),
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    if library.abyssal_fp8_swiglu_gradients(record) != OK:
        return None
    return (
        rows_T2F,
        columns_T2F,
        dweights_T if weights_T is None or dweights_T is None else dweights_T.to(weights_T.dtype),
    )


def _are_weights(weights_T: Tensor | None, rows: int) -> bool:
    return weights_T is None or (weights_T.is_cpu and weights_T.dtype in DTYPE_CODES and weights_T.shape == (rows,))


def _halves(gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.unflatten(-1, (2, -1))


def _wide(weights_T: Tensor | None) -> Tensor | None:
    return None if weights_T is None else weights_T.float()
