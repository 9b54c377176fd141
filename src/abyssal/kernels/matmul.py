"""Matrix products as this processor computes them fastest.

torch multiplies BF16 on CPU through oneDNN, which wants AVX-512; on other processors it falls back to a loop that is
slower than the product in FP32 by far.  There, BF16 operands are raised to FP32, multiplied, and the
result rounded once, at nearly the speed of FP32.

Error bound: one product accumulated in FP32 (FP64 for FP64), rounded once to the operands' dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has BF16 products that are faster than FP32's."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which a product of operands like this one is computed."""
    if operand.dtype is torch.bfloat16 and operand.is_cpu and not multiplies_bf16():
        return torch.float32
    return operand.dtype


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` for matrices and stacks of them, in their dtype, written to ``out`` where given."""
    dtype = product_dtype(a)
    if dtype is a.dtype:
        return torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)
    product = torch.matmul(a.to(dtype), b.to(dtype))
    return product.to(a.dtype) if out is None else out.copy_(product)
