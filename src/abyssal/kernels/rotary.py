"""Rotary positions without gradients: the pairs of each row turned by the angles of its token.

The definition is ``apply_rotation`` of ``model/rope.py`` in torch, which training uses.  Here a product is rounded
before it is added wherever it stands in the array, which complex products of torch leave to the instruction set.

Legend: T tokens, H heads, R rotary width.
Error bound: two roundings of FP32 on each product's and sum's value, then one to the dtype of x.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from abyssal.kernels.native import DTYPE_CODES, OK, native_library

_pack = struct.Struct("=11q").pack  # the record `Arguments` of csrc/rotate.cpp


def native(x: Tensor, turns: Tensor, interleaved: bool, *, isa_limit: int = -1) -> Tensor | None:
    """The C++ of ``csrc/rotate.cpp``: ``x``, (T, R) or (T, H, R), turned; None where it does not apply.

    It takes CPU tensors in FP32 or BF16 of contiguous rows, ``turns`` (T, R/2) in complex FP32, and has no backward.
    ``isa_limit`` is the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library, code = native_library(), DTYPE_CODES.get(x.dtype)
    if library is None or code is None or not x.is_cpu or turns.dtype is not torch.complex64:
        return None
    x_THR = x if x.ndim == 3 else x[:, None]
    tokens, heads, width = x_THR.shape
    token_stride, head_stride, unit = x_THR.stride()
    if unit != 1 or turns.shape != (tokens, width // 2) or width % 2 or not turns.is_contiguous():
        return None
    y = x.new_empty(x.shape)
    pointers, sizes = (x.data_ptr(), turns.data_ptr(), y.data_ptr()), (tokens, heads, width // 2)
    record = _pack(*pointers, code, int(interleaved), *sizes, token_stride, head_stride, isa_limit)
    return y if library.abyssal_rotate(record) == OK else None
