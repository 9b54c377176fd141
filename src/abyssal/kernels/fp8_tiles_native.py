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
from abyssal.spec.tile_format import CodeName, ScaleName, TileFormat, TileName, tiles_along

CODE_DTYPES: dict[CodeName, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e5m6": torch.uint8,
}
SCALE_DTYPES: dict[ScaleName, torch.dtype] = {"float32": torch.float32, "ue8m0": torch.float8_e8m0fnu}
_TILES: dict[TileName, int] = {"1x128": 0, "128x1": 1, "128x128": 2}
_CODES: dict[CodeName, int] = {"e4m3": 0, "e5m2": 1, "e5m6": 2}
_SCALES: dict[ScaleName, int] = {"float32": 0, "ue8m0": 1}
_pack = struct.Struct("=26q").pack  # the record `Arguments` of csrc/fp8_tiles.cpp
_pack_dequantise = struct.Struct("=15q").pack  # its `DequantiseArguments`


@dataclass(frozen=True)
class Found:
    """What was asked for; None for the rest."""

    codes: Tensor | None
    scales: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class KeptPointers:
    """Of codes and scales in tiles along rows, and what they are."""

    codes: int = 0
    scales: int = 0
    code: int = 0
    scale: int = 0


@dataclass(frozen=True)
class _Source:
    """What is quantised: values, or what is kept of them."""

    shape: Sequence[int]
    sizes: Sequence[int]
    """Matrices, rows and columns."""
    x: int = 0
    x_code: int = 0
    strides: Sequence[int] = (0, 0)
    kept: KeptPointers = KeptPointers()
    gated: int = 0
    weights: Tensor | None = None


def format_codes(form: TileFormat) -> tuple[int, int]:
    """``CodeKind`` and ``ScaleKind`` of ``csrc/fp8_tiles.h``."""
    return _CODES[form.code], _SCALES[form.scale]


def empty_tiles(shape: Sequence[int], form: TileFormat, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales to be filled, of values of ``shape``."""
    *leading, columns = shape
    rows = () if form.tile == "1x128" else (leading.pop(),)
    scale_shape = form.scale_shape(*(rows or (1,)), columns, counts)[1 - len(rows) :]
    codes = torch.empty(*leading, *rows, form.code_columns(columns), dtype=CODE_DTYPES[form.code])
    return codes, torch.empty(*leading, *scale_shape, dtype=SCALE_DTYPES[form.scale])


def is_kept(codes: Tensor, scales: Tensor, form: TileFormat, columns: int) -> bool:
    """Whether the C++ can read these as ``columns`` values a row in tiles along rows."""
    return (
        codes.is_cpu
        and form.tile == "1x128"
        and codes.dtype is CODE_DTYPES[form.code]
        and scales.dtype is SCALE_DTYPES[form.scale]
        and codes.shape[-1] == form.code_columns(columns)
        and scales.shape == (*codes.shape[:-1], tiles_along(columns))
    )


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
    source = _Source(x.shape, x3.shape, x3.data_ptr(), DTYPE_CODES[x.dtype], x3.stride()[:2])
    return _run(source, form, dtype, counts, codes, isa_limit)


def turn(
    codes: Tensor,
    scales: Tensor,
    kept: TileFormat,
    columns: int,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    *,
    isa_limit: int = -1,
) -> Tensor | None:
    """Values in ``dtype``, in ``form``, of codes and scales in the ``1x128`` tiles of ``kept``; (rows, columns)."""
    if codes.ndim != 2 or form.tile not in _TILES or not is_kept(codes, scales, kept, columns):
        return None
    codes, scales = codes.contiguous(), scales.contiguous()
    shape = len(codes), columns
    source = _Source(shape, (1, *shape), kept=KeptPointers(codes.data_ptr(), scales.data_ptr(), *format_codes(kept)))
    found = _run(source, form, dtype, counts, False, isa_limit)
    return None if found is None else found.values


def swiglu_turned(
    codes: Tensor,
    scales: Tensor,
    kept: TileFormat,
    columns: int,
    weights: Tensor | None,
    activation: torch.dtype,
    form: TileFormat,
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
    *,
    isa_limit: int = -1,
) -> Tensor | None:
    """As :func:`turn`, of SwiGLU of (rows, 2, columns) and routing weights (rows,), rounded to ``activation``: (rows,
    columns)."""
    if activation not in DTYPE_CODES:
        return None
    if codes.ndim != 3 or form.tile not in _TILES or not is_kept(codes, scales, kept, columns):
        return None
    if weights is not None and (weights.dtype not in DTYPE_CODES or weights.shape != codes.shape[:1]):
        return None
    codes, scales, weights = codes.contiguous(), scales.contiguous(), None if weights is None else weights.contiguous()
    shape = len(codes), columns
    pointers = KeptPointers(codes.data_ptr(), scales.data_ptr(), *format_codes(kept))
    source = _Source(shape, (1, *shape), kept=pointers, gated=1 + DTYPE_CODES[activation], weights=weights)
    found = _run(source, form, dtype, counts, False, isa_limit)
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
        *format_codes(form),
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
    source: _Source,
    form: TileFormat,
    dtype: torch.dtype | None,
    counts: Sequence[int] | None,
    wants_codes: bool,
    isa_limit: int,
) -> Found | None:
    library = native_library()
    if library is None or (dtype is not None and dtype not in DTYPE_CODES):
        return None
    if counts is not None and form.tile != "128x1":
        return None
    codes, scales = empty_tiles(source.shape, form, counts) if wants_codes else (None, None)
    values = None if dtype is None else torch.empty(source.shape, dtype=dtype)
    groups = None if counts is None else array("q", counts)
    kept, weights = source.kept, source.weights
    record = _pack(
        source.x,
        kept.codes,
        kept.scales,
        *(0 if part is None else part.data_ptr() for part in (weights, codes, scales, values)),
        0 if groups is None else groups.buffer_info()[0],
        source.x_code,
        0 if weights is None else DTYPE_CODES[weights.dtype],
        DTYPE_CODES[dtype or torch.float32],
        kept.code,
        kept.scale,
        source.gated,
        _TILES[form.tile],
        *format_codes(form),
        *source.sizes,
        0 if groups is None else len(groups),
        *source.strides,
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    return Found(codes, scales, values) if library.abyssal_fp8_quantise(record) == OK else None
