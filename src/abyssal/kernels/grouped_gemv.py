"""Grouped matrix-vector product: each row of x times the whole matrix of the slot it names.

This is the matrix product of decoding.  A few tokens meet every weight once, so the time is the time to read the
weights, and the general matrix product of a BLAS, made for reuse, reaches a fraction of the memory's bandwidth on it.
A dense layer is the case of one slot.  With many rows a slot (prefill, training) a grouped GEMM is faster: the caller
chooses, this operator does not.

Row-invariant: a row's result never depends, in any bit, on the other rows or on the number of threads.

Legend: R rows (a token at one of its experts), E slots, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch

from abyssal.kernels.native import DTYPE_CODES, native_library, openmp_fork

Implementation = Literal["auto", "reference", "native"]


def grouped_gemv(
    x_RI: torch.Tensor,
    weight_EOI: torch.Tensor,
    slots_R: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """``y[r] = weight[slots[r]] @ x[r]``, summed in FP32 (FP64 if an argument is FP64).

    Args:
        x_RI: FP32, BF16 or FP64.
        weight_EOI: matrices stacked by slot; the same dtypes, which need not equal x's.
        slots_R: int64, each in ``[0, E)``.
        out_dtype: dtype of the result; default x's.
        implementation: "auto" takes "native" where it applies (CPU, contiguous, FP32 or BF16, no gradient wanted,
            library built), else "reference".  Gradients flow through the reference alone.

    Returns:
        y_RO, within :func:`error_bound` of the exact product whichever implementation ran.

    Raises:
        ValueError: shapes that do not fit, a slot out of range, or "native" where it does not apply.
    """
    _check_shapes(x_RI, weight_EOI, slots_R)
    return _run(x_RI, weight_EOI, slots_R, out_dtype or x_RI.dtype, implementation)


def gemv(
    x_RI: torch.Tensor,
    weight_OI: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """``y[r] = weight @ x[r]``: :func:`grouped_gemv` with one slot."""
    if x_RI.ndim != 2 or weight_OI.ndim != 2 or x_RI.shape[1] != weight_OI.shape[1]:
        raise ValueError(f"gemv: x {tuple(x_RI.shape)} must be (R, I) and weight {tuple(weight_OI.shape)} (O, I)")
    return _run(x_RI, weight_OI.unsqueeze(0), None, out_dtype or x_RI.dtype, implementation)


def reference(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """What the operator means, one row at a time so that no row can see another.  Differentiable."""
    accumulate = torch.promote_types(torch.promote_types(x_RI.dtype, weight_EOI.dtype), torch.float32)
    # unbind, not indexing: the backward of weight[slot] would write a zero gradient of the whole stack for each row.
    matrices = weight_EOI.unbind(0)
    slots = [0] * x_RI.shape[0] if slots_R is None else slots_R.tolist()
    rows = [torch.mv(matrices[slot].to(accumulate), x_I.to(accumulate)) for slot, x_I in zip(slots, x_RI, strict=True)]
    if not rows:
        return x_RI.new_zeros((0, weight_EOI.shape[1]), dtype=out_dtype)
    return torch.stack(rows).to(out_dtype)


def error_bound(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Largest distance (R, O), in FP64, of any implementation's result from the exact product.

    A sum of I products in any order is within ``I u / (1 - I u) * sum |w x|`` of the exact one, u = 2^-24 for FP32
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); the result is then rounded to ``out_dtype``.
    The last term covers results below the smallest normal number.
    """
    accumulate = torch.promote_types(torch.promote_types(x_RI.dtype, weight_EOI.dtype), torch.float32)
    inputs = x_RI.shape[1]
    unit = torch.finfo(accumulate).eps / 2
    sums_RO = reference(x_RI.double().abs(), weight_EOI.double().abs(), slots_R, torch.float64)
    summed_RO = inputs * unit / (1 - inputs * unit) * sums_RO
    rounded_RO = torch.finfo(out_dtype).eps / 2 * (sums_RO + summed_RO) if out_dtype != accumulate else 0.0
    return summed_RO + rounded_RO + (inputs + 1) * torch.finfo(torch.float32).tiny


def native_refusal(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None, out_dtype: torch.dtype
) -> str | None:
    """Why the native implementation cannot take these arguments; None if it can."""
    tensors = (x_RI, weight_EOI) if slots_R is None else (x_RI, weight_EOI, slots_R)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "a tensor is not on the CPU"
    if any(not tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    for dtype in (x_RI.dtype, weight_EOI.dtype, out_dtype):
        if dtype not in DTYPE_CODES:
            return f"it takes float32 and bfloat16, not {dtype}"
    if torch.is_grad_enabled() and (x_RI.requires_grad or weight_EOI.requires_grad):
        return "it has no backward: call it under torch.no_grad()"
    if native_library() is None:
        return "the library was not built: a C++ compiler is needed when installing"
    return None


def native(
    x_RI: torch.Tensor,
    weight_EOI: torch.Tensor,
    slots_R: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    isa_limit: int = -1,
) -> torch.Tensor:
    """The C++ of ``csrc/grouped_gemv.cpp``, on ``torch.get_num_threads()`` threads.

    Args:
        isa_limit: strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the machine's best.
    """
    num_slots, outputs, inputs = weight_EOI.shape
    rows = x_RI.shape[0]
    y_RO = torch.empty((rows, outputs), dtype=out_dtype)
    status = _native_function()(
        weight_EOI.data_ptr(),
        DTYPE_CODES[weight_EOI.dtype],
        x_RI.data_ptr(),
        DTYPE_CODES[x_RI.dtype],
        y_RO.data_ptr(),
        DTYPE_CODES[out_dtype],
        None if slots_R is None else slots_R.data_ptr(),
        rows,
        num_slots,
        outputs,
        inputs,
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    if status == 2:
        raise ValueError(_slot_message(slots_R, num_slots))
    assert status == 0, f"abyssal_grouped_gemv returned {status}"
    return y_RO


@cache
def _native_function():
    library = native_library()
    assert library is not None
    function = library.abyssal_grouped_gemv
    pointer, code, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    function.argtypes = [pointer, code, pointer, code, pointer, code, pointer, *[count] * 4, code, pointer, code]
    function.restype = ctypes.c_int32
    return function


def _run(
    x_RI: torch.Tensor,
    weight_EOI: torch.Tensor,
    slots_R: torch.Tensor | None,
    out_dtype: torch.dtype,
    implementation: Implementation,
) -> torch.Tensor:
    if implementation == "reference":
        return _checked_reference(x_RI, weight_EOI, slots_R, out_dtype)
    refusal = native_refusal(x_RI, weight_EOI, slots_R, out_dtype)
    if refusal is None:
        return native(x_RI, weight_EOI, slots_R, out_dtype)
    if implementation == "native":
        raise ValueError(f"grouped_gemv: implementation='native' does not apply: {refusal}")
    return _checked_reference(x_RI, weight_EOI, slots_R, out_dtype)


def _checked_reference(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    num_slots = weight_EOI.shape[0]
    if slots_R is not None and slots_R.numel() and not 0 <= int(slots_R.min()) <= int(slots_R.max()) < num_slots:
        raise ValueError(_slot_message(slots_R, num_slots))
    return reference(x_RI, weight_EOI, slots_R, out_dtype)


def _check_shapes(x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor) -> None:
    shapes_fit = x_RI.ndim == 2 and weight_EOI.ndim == 3 and x_RI.shape[1] == weight_EOI.shape[2]
    if not shapes_fit or slots_R.shape != x_RI.shape[:1]:
        raise ValueError(
            f"grouped_gemv: x {tuple(x_RI.shape)} must be (R, I), weight {tuple(weight_EOI.shape)} (E, O, I) "
            f"and slots {tuple(slots_R.shape)} (R)"
        )
    if slots_R.dtype != torch.int64:
        raise ValueError(f"grouped_gemv: slots must be int64, not {slots_R.dtype}")


def _slot_message(slots_R: torch.Tensor | None, num_slots: int) -> str:
    named = [] if slots_R is None else [slot for slot in slots_R.tolist() if not 0 <= slot < num_slots]
    return f"grouped_gemv: slots {named[:4]} are outside the {num_slots} slots of the weight"
