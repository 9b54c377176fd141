"""Cache entries in FP8: rows of values become bytes where they are written, and values again where they are read.

Which byte is what, :class:`~abyssal.spec.fp8_entry.Fp8Entry` says: E4M3 codes with an FP32 scale for each tile of 128
values, then values in BF16.  A scale is the tile's largest magnitude over 448; value = code x scale, multiplied in FP32
and rounded once to the dtype that is asked for.  Each entry is converted by itself, so what is read depends on what was
written to that entry and on nothing else.

Error bound.  For a value x in a tile of scale s: |read - x| <= max(2^-4 |x|, 2^-10 (1 + 2^-18) s), as in
:mod:`~abyssal.kernels.fp8_tiles`; a plain value's is 2^-8 |x|, and reading as BF16 adds 2^-8 relative to codes.  A tile
with an infinity or a NaN is read as NaN throughout.  The native form has the bits of the reference.

Powers of two as scales would make the product exact, and cost a bit of range; their error on real entries is the same.

Legend: T tokens, X values and Y bytes of an entry, N entries.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.kernels.fp8_tiles_reference import SMALLEST_SCALE
from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork
from abyssal.spec.fp8_entry import TILE, Fp8Entry
from abyssal.spec.tile_format import CODES

_E4M3_MAX = CODES["e4m3"].largest
_NAN_CODE = 0x7F
_pack = struct.Struct("=15q").pack  # the record `Arguments` of csrc/fp8_pages.cpp


def quantise_entries(values_TX: Tensor, entry: Fp8Entry) -> Tensor:
    """(T, Y) bytes, uint8: the definition."""
    codes_TX, plain_TX = values_TX.float().split([entry.num_codes, entry.plain_values], 1)
    tiles_TrtX = _tiles(codes_TX, entry)
    amax_Trt = tiles_TrtX.abs().amax(-1)
    scales_Trt = (amax_Trt / _E4M3_MAX).clamp(min=SMALLEST_SCALE)
    scales_Trt = torch.where(amax_Trt == 0, 1.0, scales_Trt)
    scales_Trt = torch.where(amax_Trt.isfinite(), scales_Trt, torch.nan)
    scaled_TrtX = (tiles_TrtX / scales_Trt[..., None]).clamp(-_E4M3_MAX, _E4M3_MAX)
    bytes_TrtX = scaled_TrtX.to(torch.float8_e4m3fn).view(torch.uint8)
    bytes_TrtX = torch.where(scales_Trt[..., None].isnan(), _NAN_CODE, bytes_TrtX)
    rows_TY = values_TX.new_zeros(len(values_TX), entry.num_bytes, dtype=torch.uint8)
    rows_TY[:, : entry.num_codes] = bytes_TrtX.flatten(2)[..., : entry.run_values].flatten(1)
    scale_bytes_TY = scales_Trt.flatten(1).contiguous().view(torch.uint8)
    rows_TY[:, entry.scales_at : entry.plain_at] = scale_bytes_TY
    plain_bytes_TY = plain_TX.to(torch.bfloat16).contiguous().view(torch.uint8)
    rows_TY[:, entry.plain_at : entry.plain_at + 2 * entry.plain_values] = plain_bytes_TY
    return rows_TY


def dequantise_entries(rows_TY: Tensor, entry: Fp8Entry, dtype: torch.dtype) -> Tensor:
    """(T, X) of ``dtype`` from the bytes of :func:`quantise_entries`: the definition."""
    codes_TX = _as(rows_TY[:, : entry.num_codes], torch.float8_e4m3fn).float()
    scales_Trt = _as(rows_TY[:, entry.scales_at : entry.plain_at], torch.float32)
    scales_TrX = scales_Trt.view(len(rows_TY), entry.runs, -1).repeat_interleave(TILE, -1)[..., : entry.run_values]
    values_TX = (codes_TX * scales_TrX.flatten(1)).to(dtype)
    if not entry.plain_values:
        return values_TX
    plain_TY = rows_TY[:, entry.plain_at : entry.plain_at + 2 * entry.plain_values]
    return torch.cat([values_TX, _as(plain_TY, torch.bfloat16).to(dtype)], 1)


def _as(bytes_TY: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, copied because they may lie at any address, as numbers."""
    return bytes_TY.clone(memory_format=torch.contiguous_format).view(dtype)


def _tiles(codes_TX: Tensor, entry: Fp8Entry) -> Tensor:
    """(T, runs, tiles a run, 128): the last tile of each run filled up with zeros."""
    runs_TrX = codes_TX.reshape(len(codes_TX), entry.runs, entry.run_values)
    padded_TrX = functional.pad(runs_TrX, (0, entry.tiles_per_run * TILE - entry.run_values))
    return padded_TrX.unflatten(-1, (entry.tiles_per_run, TILE))


def write_entries(rows_NY: Tensor, slots_T: Tensor, values_TX: Tensor, entry: Fp8Entry) -> None:
    """Write ``values_TX`` as the entries ``slots_T``, each of them once."""
    if not native_write(rows_NY, slots_T, values_TX, entry):
        rows_NY.index_copy_(0, slots_T, quantise_entries(values_TX, entry))


def read_entries(rows_NY: Tensor, slots_T: Tensor, entry: Fp8Entry, dtype: torch.dtype) -> Tensor:
    """(T, X) of ``dtype``: the entries ``slots_T``."""
    values_TX = native_read(rows_NY, slots_T, entry, dtype)
    if values_TX is None:
        return dequantise_entries(rows_NY.index_select(0, slots_T), entry, dtype)
    return values_TX


def native_write(rows_NY: Tensor, slots_T: Tensor, values_TX: Tensor, entry: Fp8Entry, *, isa_limit: int = -1) -> bool:
    """The C++ of ``csrc/fp8_pages.cpp``; False, with nothing written, where it does not apply.

    It takes contiguous CPU rows of bytes, values in FP32 or BF16, and a contiguous int64 index of existing rows.
    ``isa_limit`` is the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library = native_library()
    values_TX = values_TX.contiguous()
    record = _record(rows_NY, slots_T, values_TX, entry, isa_limit)
    return library is not None and record is not None and library.abyssal_fp8_write(record) == OK


def native_read(
    rows_NY: Tensor, slots_T: Tensor, entry: Fp8Entry, dtype: torch.dtype, *, isa_limit: int = -1
) -> Tensor | None:
    """As :func:`native_write`; None where it does not apply."""
    library = native_library()
    if library is None or dtype not in DTYPE_CODES:
        return None
    values_TX = torch.empty(len(slots_T), entry.values, dtype=dtype, device=rows_NY.device)
    record = _record(rows_NY, slots_T, values_TX, entry, isa_limit)
    return values_TX if record is not None and library.abyssal_fp8_read(record) == OK else None


def _record(rows_NY: Tensor, slots_T: Tensor, values_TX: Tensor, entry: Fp8Entry, isa_limit: int) -> bytes | None:
    code = DTYPE_CODES.get(values_TX.dtype)
    if code is None or not (rows_NY.is_cpu and rows_NY.is_contiguous() and slots_T.is_contiguous()):
        return None
    if slots_T.dtype != torch.int64 or rows_NY.shape[1] != entry.num_bytes:
        return None
    if values_TX.shape != (len(slots_T), entry.values):
        return None
    pointers = values_TX.data_ptr(), slots_T.data_ptr(), rows_NY.data_ptr()
    sizes = entry.runs, entry.run_values, entry.plain_values, entry.scales_at, entry.plain_at, entry.num_bytes
    threads = torch.get_num_threads(), openmp_fork()
    return _pack(*pointers, code, len(slots_T), len(rows_NY), *sizes, *threads, isa_limit)
