"""SwiGLU with the routing weight: h = silu(gate) · up · w, computed in FP32 at least and rounded once.

The routing weight is applied here, before the down projection, rather than to the expert's output: the result is the
same, the row is narrower, and combining becomes a plain sum, which may then be taken in any place on the way back.
Only the input is kept for the backward; the output is computed again there [V3 section 3.2.3].

Legend: T rows, F hidden width; the input's columns are [gate; up].
Error bound: 4 units in the last place of the output dtype, a unit being the dtype's eps times the value; the native
form has it for every finite gate above -87 and adds 2^-142 · |up · weight| below (``csrc/swiglu.cpp`` counts).
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork

_pack = struct.Struct("=11q").pack  # the record `Arguments` of csrc/swiglu.cpp
_pack_backward = struct.Struct("=13q").pack  # the record `Arguments` of csrc/swiglu_backward.cpp


def swiglu_reference(gate_up_T2F: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """The definition, differentiable by autograd."""
    wide = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    gate, up = gate_up_T2F.to(wide).chunk(2, dim=-1)
    h = gate * torch.sigmoid(gate) * up
    if weights_T is not None:
        h = h * weights_T.to(wide)[:, None]
    return h.to(gate_up_T2F.dtype)


def _forward(gate_up_T2F: Tensor, weights_T: Tensor | None) -> Tensor:
    wide = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate.to(wide)).mul_(up)
    if weights_T is not None:
        h.mul_(weights_T[:, None])
    return h.to(gate_up_T2F.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor, weights_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_T2F, weights_T)
        h_TF = native(gate_up_T2F, weights_T)
        return _forward(gate_up_T2F, weights_T) if h_TF is None else h_TF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_T2F, weights_T = ctx.saved_tensors
        return swiglu_backward(gate_up_T2F, weights_T, gradients[0])


def swiglu_backward(gate_up_T2F: Tensor, weights_T: Tensor | None, dh_TF: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients (T, 2F) of the input and (T,) of the weights, from that of the output, in the dtypes of either."""
    found = native_backward(gate_up_T2F, weights_T, dh_TF)
    return _backward(gate_up_T2F, weights_T, dh_TF) if found is None else found


def _backward(gate_up_T2F: Tensor, weights_T: Tensor | None, dh_TF: Tensor) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    gate, up = (part.to(wide) for part in gate_up_T2F.chunk(2, dim=-1))
    dh = dh_TF.to(wide)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dweights = None
    if weights_T is not None:
        dweights = (dh * silu).mul_(up).sum(-1).to(weights_T.dtype)
        dh = dh * weights_T[:, None]
    width = up.shape[-1]
    out = torch.empty_like(gate_up_T2F)
    out[:, width:] = dh * silu
    # d silu = sigmoid · (1 + gate · (1 − sigmoid)) = sigmoid + silu · (1 − sigmoid)
    out[:, :width] = dh.mul(up).mul_(sigmoid.add_(silu.mul_(1 - sigmoid)))
    return out, dweights


def native(gate_up_T2F: Tensor, weights_T: Tensor | None, *, isa_limit: int = -1) -> Tensor | None:
    """The C++ of ``csrc/swiglu.cpp``; None where it does not apply.

    It takes CPU tensors in FP32 or BF16 (input and weights each), rows of contiguous values, and has no backward.
    ``isa_limit`` is the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library, code = native_library(), DTYPE_CODES.get(gate_up_T2F.dtype)
    if library is None or code is None or not gate_up_T2F.is_cpu or gate_up_T2F.ndim != 2:
        return None
    rows, columns = gate_up_T2F.shape
    stride, unit = gate_up_T2F.stride()
    if unit != 1 or columns % 2:
        return None
    weights_code, weights = 0, 0
    if weights_T is not None:
        weights_code, weights = DTYPE_CODES.get(weights_T.dtype), weights_T.data_ptr()
        if weights_code is None or not weights_T.is_cpu or weights_T.shape != (rows,) or weights_T.stride(0) != 1:
            return None
    width = columns // 2
    h_TF = gate_up_T2F.new_empty((rows, width))
    pointers = gate_up_T2F.data_ptr(), weights, h_TF.data_ptr()
    threads = torch.get_num_threads()
    record = _pack(*pointers, code, weights_code, rows, width, stride, threads, openmp_fork(), isa_limit)
    return h_TF if library.abyssal_swiglu(record) == OK else None


def native_backward(
    gate_up_T2F: Tensor, weights_T: Tensor | None, dh_TF: Tensor, *, isa_limit: int = -1
) -> tuple[Tensor, Tensor | None] | None:
    """Gradients (T, 2F) of the input and (T,) of the weights; None where it does not apply, as in :func:`native`.

    The C++ of ``csrc/swiglu_backward.cpp``.  Within 8 units in the last place of the largest term of each sum.
    """
    library, code = native_library(), DTYPE_CODES.get(gate_up_T2F.dtype)
    if library is None or code is None or not gate_up_T2F.is_cpu or gate_up_T2F.ndim != 2:
        return None
    rows, columns = gate_up_T2F.shape
    stride, unit = gate_up_T2F.stride()
    if unit != 1 or columns % 2 or dh_TF.dtype != gate_up_T2F.dtype:
        return None
    weights_code, weights, dweights_T = 0, 0, None
    if weights_T is not None:
        weights_code, weights = DTYPE_CODES.get(weights_T.dtype), weights_T.data_ptr()
        if weights_code is None or not weights_T.is_cpu or weights_T.shape != (rows,) or weights_T.stride(0) != 1:
            return None
        dweights_T = torch.empty(rows)
    dh_TF = dh_TF.contiguous()
    dgate_up_T2F = gate_up_T2F.new_empty((rows, columns))
    pointers = gate_up_T2F.data_ptr(), weights, dh_TF.data_ptr(), dgate_up_T2F.data_ptr()
    dweights = 0 if dweights_T is None else dweights_T.data_ptr()
    sizes = rows, columns // 2, stride
    record = _pack_backward(
        *pointers, dweights, code, weights_code, *sizes, torch.get_num_threads(), openmp_fork(), isa_limit
    )
    if library.abyssal_swiglu_backward(record) != OK:
        return None
    return dgate_up_T2F, None if weights_T is None or dweights_T is None else dweights_T.to(weights_T.dtype)


def swiglu(gate_up_T2F: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """silu(gate) · up, times each row's routing weight when given.  Returns (T, F) in the input's dtype."""
    needs_grad = gate_up_T2F.requires_grad or (weights_T is not None and weights_T.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _SwiGLU.apply(gate_up_T2F, weights_T)  # type: ignore[no-any-return]
    h_TF = native(gate_up_T2F, weights_T)
    return _forward(gate_up_T2F, weights_T) if h_TF is None else h_TF
