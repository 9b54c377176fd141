"""The C++ of ``csrc/fp8_tiles.cpp``: the bytes of :mod:`~abyssal.kernels.fp8_tiles`, in one pass over memory.

Each function returns None where it does not apply: it takes CPU tensors in FP32 or BF16, and has no form with one scale
in all.  Rows of contiguous values may lie at any distance; other layouts are copied first.  ``isa_limit`` is the
strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork
from abyssal.spec.tile_format import CodeName, ScaleName, TileFormat, TileName

CODE_DTYPES: dict[CodeName, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e5m6": torch.uint8,
}
SCALE_DTYPES: dict[ScaleName, torch.dtype] = {"float32": torch.float32, "ue8m0": torch.float8_e8m0fnu}
_TILES: dict[TileName, int] = {"1x128": 0, "128x1": 1, "128x128": 2}
_CODES: dict[CodeName, int] = {"e4m3": 0, "e5m2": 1, "e5m6": 2}
_SCALES: dict[ScaleName, int] = {"float32": 0, "ue8m0": 1}
_pack = struct.Struct("=23q").pack  # the record `Arguments` of csrc/fp8_tiles.cpp
_pack_dequantise = struct.Struct("=15q").pack  # its `DequantiseArguments`


@dataclass(frozen=True)
class Found:
    """What was asked for; None for the rest."""

    codes: Tensor | None
    scales: Tensor | None
    values: Tensor | None


def quantise(
    x: Tensor,
    form: TileFormat,
    dtype: torch.dtype | None = None,
    counts: Sequence[int] | None = None,
    *,
    codes: bool = True,
    isa_limit: int = -1,
) -> Found | None:
    """Codes and scales of ``x`` (unless ``codes`` is false), and values in ``dtype`` (unless it is None)."""
    if not (x.is_cpu and x.dtype in DTYPE_CODES and form.tile in _TILES and x.ndim > (form.tile != "1x128")):
        return None
    x3 = _as_matrices(x)
    matrices, rows, columns = x3.shape
    source = x3.data_ptr(), 0, 0, DTYPE_CODES[x.dtype], 0, 0
    sizes = matrices, rows, columns, x3.stride(0), x3.stride(1)
    return _run(source, x.shape, sizes, form, dtype, counts, codes, isa_limit)


def turn(
    codes: Tensor,
    scales: Tensor,
    turned: TileFormat,
    columns: int,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    *,
    isa_limit: int = -1,
) -> Tensor | None:
    """Values in ``dtype``, in ``form``, of codes and scales in the ``1x128`` tiles of ``turned``; (rows, columns)."""
    if not (codes.is_cpu and codes.ndim == 2 and turned.tile == "1x128" and form.tile in ("128x1", "128x128")):
        return None
    if scales.shape != turned.scale_shape(len(codes), columns):
        return None
    codes, scales = codes.contiguous(), scales.contiguous()
    source = 0, codes.data_ptr(), scales.data_ptr(), 0, _CODES[turned.code], _SCALES[turned.scale]
    shape = len(codes), columns
    found = _run(source, shape, (1, *shape, 0, 0), form, dtype, counts, False, isa_limit)
    return None if found is None else found.values


def dequantise(
    codes: Tensor,
    scales: Tensor,
    form: TileFormat,
    columns: int,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    *,
    isa_limit: int = -1,
) -> Tensor | None:
    """code x scale in ``dtype``."""
    library = native_library()
    if library is None or not codes.is_cpu or dtype not in DTYPE_CODES or form.tile not in _TILES:
        return None
    if form.tile == "1x128":  # rows are alike under any leading axes
        leading, rows = [], prod(codes.shape[:-1])
    else:
        *leading, rows = codes.shape[:-1]
    expected = (*leading, *form.scale_shape(rows, columns, counts))
    if scales.numel() != prod(expected) or codes.shape[-1] != form.code_columns(columns):
        return None
    if codes.dtype is not CODE_DTYPES[form.code] or scales.dtype is not SCALE_DTYPES[form.scale]:
        return None
    codes, scales = codes.contiguous(), scales.contiguous()
    values = torch.empty(*codes.shape[:-1], columns, dtype=dtype)
    groups = None if counts is None else array("q", counts)
    record = _pack_dequantise(
        codes.data_ptr(),
        scales.data_ptr(),
        values.data_ptr(),
        0 if groups is None else groups.buffer_info()[0],
        DTYPE_CODES[dtype],
        _TILES[form.tile],
        _CODES[form.code],
        _SCALES[form.scale],
        prod(leading),
        rows,
        columns,
        0 if groups is None else len(groups),
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    return values if library.abyssal_fp8_dequantise(record) == OK else None


def _as_matrices(x: Tensor) -> Tensor:
    """(matrices, rows, columns) with contiguous values in a row: a view where the strides allow it."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.ndim == 1:
        return x[None, None]
    return x[None] if x.ndim == 2 else x.flatten(0, -3)


def _run(
    source: tuple[int, ...],
    shape: Sequence[int],
    sizes: tuple[int, ...],
    form: TileFormat,
    dtype: torch.dtype | None,
    counts: Sequence[int] | None,
    wants_codes: bool,
    isa_limit: int,
) -> Found | None:
    library = native_library()
    if library is None or (dtype is not None and dtype not in DTYPE_CODES):
        return None
    codes = scales = values = None
    if wants_codes:
        *leading, columns = shape
        rows = () if form.tile == "1x128" else (leading.pop(),)
        scale_shape = form.scale_shape(*(rows or (1,)), columns, counts)[1 - len(rows) :]
        codes = torch.empty(*leading, *rows, form.code_columns(columns), dtype=CODE_DTYPES[form.code])
        scales = torch.empty(*leading, *scale_shape, dtype=SCALE_DTYPES[form.scale])
    if dtype is not None:
        values = torch.empty(shape, dtype=dtype)
    groups = None if counts is None else array("q", counts)
    x, turned, turned_scales, x_code, turned_code, turned_scale = source
    record = _pack(
        x,
        turned,
        turned_scales,
        *(0 if part is None else part.data_ptr() for part in (codes, scales, values)),
        0 if groups is None else groups.buffer_info()[0],
        x_code,
        DTYPE_CODES[dtype or torch.float32],
        _TILES[form.tile],
        _CODES[form.code],
        _SCALES[form.scale],
        turned_code,
        turned_scale,
        *sizes[:3],
        0 if groups is None else len(groups),
        *sizes[3:],
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    return Found(codes, scales, values) if library.abyssal_fp8_quantise(record) == OK else None
