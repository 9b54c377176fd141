"""RMSNorm that leaves its result quantised: what a product in FP8 reads [V3 section 3.3].

The norm is that of :mod:`~abyssal.kernels.rms_norm`, rounded to the activations' dtype as if it were stored, and then
quantised: fusing changes the speed and no byte.  The model composes, since router and adapters read the norm as it is.
The C++ of ``csrc/fp8_rms_norm.cpp`` does it in one pass.

Legend: T rows, D features.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from abyssal.kernels import fp8_tiles_native as tiles
from abyssal.kernels.fp8_tiles import Quantised, quantise_with_values
from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork
from abyssal.kernels.rms_norm import rms_norm
from abyssal.spec.tile_format import TileFormat

_pack = struct.Struct("=16qd").pack  # the record `Arguments` of csrc/fp8_rms_norm.cpp


def rms_norm_quantised(
    x_TD: Tensor, weight_D: Tensor, eps: float, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Tensor]:
    """The normalised rows in ``1x128`` tiles of ``form``, and their values in ``dtype``."""
    found = native(x_TD, weight_D, eps, form, dtype)
    return composed(x_TD, weight_D, eps, form, dtype) if found is None else found


@torch.no_grad()
def composed(
    x_TD: Tensor, weight_D: Tensor, eps: float, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Tensor]:
    """The definition."""
    return quantise_with_values(rms_norm(x_TD, weight_D, eps), form, dtype)


def native(
    x_TD: Tensor, weight_D: Tensor, eps: float, form: TileFormat, dtype: torch.dtype, *, isa_limit: int = -1
) -> tuple[Quantised, Tensor] | None:
    """In C++; None where it does not apply: it takes what :func:`abyssal.kernels.rms_norm.native` takes."""
    library = native_library()
    code, weight_code = DTYPE_CODES.get(x_TD.dtype), DTYPE_CODES.get(weight_D.dtype)
    if library is None or code is None or weight_code is None or dtype not in DTYPE_CODES:
        return None
    if not (x_TD.is_cpu and weight_D.is_cpu and x_TD.ndim == 2 and form.tile == "1x128"):
        return None
    if weight_D.shape != x_TD.shape[1:] or weight_D.stride(0) != 1 or x_TD.stride(1) != 1:
        return None
    rows, width = x_TD.shape
    codes, scales = tiles.empty_tiles(x_TD.shape, form)
    values = torch.empty(rows, width, dtype=dtype)
    pointers = (part.data_ptr() for part in (x_TD, weight_D, codes, scales, values))
    kinds = code, weight_code, DTYPE_CODES[dtype], *tiles.format_codes(form)
    threads = torch.get_num_threads(), openmp_fork()
    record = _pack(*pointers, *kinds, rows, width, x_TD.stride(0), *threads, isa_limit, eps)
    return (Quantised(codes, scales, form, width), values) if library.abyssal_fp8_rms_norm(record) == OK else None
