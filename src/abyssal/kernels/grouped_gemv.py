"""Grouped matrix-vector product: each row of x times the whole matrix of the slot it names.

This is the matrix product of decoding.  A few tokens meet every weight once, so the time is the time to read the
weights, and the general matrix product of a BLAS, made for reuse, reaches a fraction of the memory's bandwidth on it.
A dense layer is the case of one slot.  With many rows a slot (prefill, training) a grouped GEMM is faster: the caller
chooses, this operator does not.

The weight may be a view, for one stored matrix often serves two products: latent attention decodes with the upper
rows of each head's up-projection as they are and with the lower ones transposed, and neither is worth a copy.

Row-invariant: a row's result never depends, in any bit, on the other rows or on the number of threads.

Legend: R rows (a token at one of its experts), E slots, O outputs, I inputs.
"""

from __future__ import annotations

import struct
from typing import Literal

import torch

from abyssal.kernels.native import BAD_SHAPE, BAD_SLOT, DTYPE_CODES, NO_STORAGE, OK, native_library, openmp_fork

Implementation = Literal["auto", "reference", "native"]

_pack = struct.Struct("=18q").pack  # the record `Arguments` of csrc/grouped_gemv.cpp


def grouped_gemv(
    x_RI: torch.Tensor,
    weight_EOI: torch.Tensor,
    slots_R: torch.Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """``y[r] = weight[slots[r]] @ x[r]``, summed in FP32 (FP64 if an argument is FP64).

    Args:
        x_RI: FP32, BF16 or FP64; rows may overlap (``x_I.expand(R, I)`` for one token at R experts).
        weight_EOI: matrices stacked by slot; the same dtypes, which need not equal x's.  A view with contiguous rows,
            or with contiguous columns (``.transpose(1, 2)`` of one).
        slots_R: int64, each in ``[0, E)``; None divides the rows equally among the slots, in order (heads).
        out_dtype: dtype of the result; default x's.
        implementation: "auto" takes "native" where it applies (CPU, FP32 or BF16, no gradient wanted, library
            built; see :func:`native_refusal`), else "reference".  Gradients flow through the reference alone.

    Returns:
        y_RO, within :func:`error_bound` of the exact product whichever implementation ran.

    Raises:
        ValueError: shapes that do not fit, a slot out of range, or "native" where it does not apply.
    """
    out_dtype = out_dtype or x_RI.dtype
    if x_RI.ndim != 2 or weight_EOI.ndim != 3:
        raise ValueError(_shape_message(x_RI, weight_EOI, slots_R))
    if implementation == "native":
        return native(x_RI, weight_EOI, slots_R, out_dtype)
    y_RO = None
    if implementation == "auto":
        y_RO = try_native(x_RI, weight_EOI, slots_R, out_dtype)
    if y_RO is None:
        _check(x_RI, weight_EOI, slots_R)
        y_RO = reference(x_RI, weight_EOI, slots_R, out_dtype)
    return y_RO


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
    if implementation != "reference":
        y_RO = try_native(x_RI, weight_OI, None, out_dtype or x_RI.dtype)
        if y_RO is not None:
            return y_RO
    return grouped_gemv(x_RI, weight_OI[None], None, out_dtype=out_dtype, implementation=implementation)


def reference(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """What the operator means, one row at a time so that no row can see another.  Differentiable."""
    accumulate = torch.promote_types(torch.promote_types(x_RI.dtype, weight_EOI.dtype), torch.float32)
    # unbind, not indexing: the backward of weight[slot] would write a zero gradient of the whole stack for each row.
    matrices = weight_EOI.unbind(0)
    rows_a_slot = max(1, x_RI.shape[0] // max(1, len(matrices)))
    slots = [row // rows_a_slot for row in range(x_RI.shape[0])] if slots_R is None else slots_R.tolist()
    rows = [torch.mv(matrices[slot].to(accumulate), x_I.to(accumulate)) for slot, x_I in zip(slots, x_RI, strict=True)]
    if not rows:
        return x_RI.new_zeros((0, weight_EOI.shape[1]), dtype=out_dtype)
    return torch.stack(rows).to(out_dtype)


def error_bound(
    x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None, out_dtype: torch.dtype
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
    if x_RI.stride(-1) != 1 or 1 not in weight_EOI.stride()[-2:] or not (slots_R is None or slots_R.is_contiguous()):
        return "a tensor is not contiguous: x by rows, the weight by rows or by columns, slots"
    for dtype in (x_RI.dtype, weight_EOI.dtype, out_dtype):
        if dtype not in DTYPE_CODES:
            return f"it takes float32 and bfloat16, not {dtype}"
    if torch.is_grad_enabled() and (x_RI.requires_grad or weight_EOI.requires_grad):
        return "it has no backward: call it under torch.no_grad()"
    if native_library() is None:
        return "the library was not built: a C++ compiler is needed when installing"
    if not (x_RI.data_ptr() and weight_EOI.data_ptr()):
        return "a tensor has no storage of its own"
    return None


def native(
    x_RI: torch.Tensor,
    weight_EOI: torch.Tensor,
    slots_R: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    isa_limit: int = -1,
) -> torch.Tensor:
    """The C++ of ``csrc/grouped_gemv.cpp`` on ``torch.get_num_threads()`` threads, or ValueError with the reason.

    ``isa_limit`` is the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    y_RO = try_native(x_RI, weight_EOI, slots_R, out_dtype, isa_limit)
    if y_RO is None:
        _check(x_RI, weight_EOI, slots_R)
        refusal = native_refusal(x_RI, weight_EOI, slots_R, out_dtype)
        raise ValueError(f"grouped_gemv: implementation='native' does not apply: {refusal}")
    return y_RO


def try_native(
    x_RI: torch.Tensor,
    weight: torch.Tensor,
    slots_R: torch.Tensor | None,
    out_dtype: torch.dtype,
    isa_limit: int = -1,
) -> torch.Tensor | None:
    """The native result, or None without a reason: at decoding these checks are made a hundred times a token.

    ``weight`` is (E, O, I) or, without slots, (O, I).
    """
    library = native_library()
    codes = DTYPE_CODES.get(weight.dtype), DTYPE_CODES.get(x_RI.dtype), DTYPE_CODES.get(out_dtype)
    if weight.ndim == 3:
        num_slots, outputs, weight_inputs = weight.shape
        slot_stride, output_stride, input_stride = weight.stride()
    else:
        (outputs, weight_inputs), num_slots = weight.shape, 1
        (output_stride, input_stride), slot_stride = weight.stride(), 0
    x_stride, unit = x_RI.stride()
    if (
        library is None
        or None in codes
        or unit != 1
        or not (input_stride == 1 or output_stride == 1)
        or not (x_RI.is_cpu and weight.is_cpu)
        or (torch.is_grad_enabled() and (x_RI.requires_grad or weight.requires_grad))
    ):
        return None
    rows, inputs = x_RI.shape
    slots = 0
    if slots_R is not None:
        if slots_R.dtype is not torch.int64 or slots_R.shape != (rows,) or not slots_R.is_contiguous():
            return None
        slots = slots_R.data_ptr() if slots_R.is_cpu else None
    if weight_inputs != inputs or slots is None:
        return None
    same = out_dtype is x_RI.dtype  # naming the dtype costs half as much again
    y_RO = x_RI.new_empty((rows, outputs)) if same else x_RI.new_empty((rows, outputs), dtype=out_dtype)
    transposed = input_stride != 1
    record = _pack(
        weight.data_ptr(),
        x_RI.data_ptr(),
        y_RO.data_ptr(),
        slots,
        *codes,
        rows,
        num_slots,
        outputs,
        inputs,
        x_stride,
        slot_stride,
        input_stride if transposed else output_stride,
        transposed,
        torch.get_num_threads(),
        openmp_fork(),
        isa_limit,
    )
    status = library.abyssal_grouped_gemv(record)
    if status == OK:
        return y_RO
    if status == BAD_SLOT:
        raise ValueError(_slot_message(slots_R, num_slots))
    assert status in (BAD_SHAPE, NO_STORAGE), f"abyssal_grouped_gemv returned {status}"
    return None


def _check(x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None) -> None:
    rows, num_slots = x_RI.shape[0], weight_EOI.shape[0]
    slots_fit = rows % max(1, num_slots) == 0 if slots_R is None else slots_R.shape == (rows,)
    if x_RI.shape[1] != weight_EOI.shape[2] or not slots_fit:
        raise ValueError(_shape_message(x_RI, weight_EOI, slots_R))
    if slots_R is None:
        return
    if slots_R.dtype != torch.int64:
        raise ValueError(f"grouped_gemv: slots must be int64, not {slots_R.dtype}")
    if rows and not 0 <= int(slots_R.min()) <= int(slots_R.max()) < num_slots:
        raise ValueError(_slot_message(slots_R, num_slots))


def _shape_message(x_RI: torch.Tensor, weight_EOI: torch.Tensor, slots_R: torch.Tensor | None) -> str:
    slots = "absent with R a multiple of E" if slots_R is None else f"{tuple(slots_R.shape)} (R)"
    x, weight = tuple(x_RI.shape), tuple(weight_EOI.shape)
    return f"grouped_gemv: x {x} must be (R, I), weight {weight} (E, O, I) and slots {slots}"


def _slot_message(slots_R: torch.Tensor | None, num_slots: int) -> str:
    named = [] if slots_R is None else [slot for slot in slots_R.tolist() if not 0 <= slot < num_slots]
    return f"grouped_gemv: slots {named[:4]} are outside the {num_slots} slots of the weight"
