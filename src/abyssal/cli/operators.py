"""Which implementation each operator uses on this machine: asked of the operators themselves, on a few numbers.

An operator's native form says where it does not apply by returning None, and PyTorch runs then.  So each is called
once, in the forms that training and inference call it in; nothing here repeats the conditions.  What training computes
in PyTorch although there is a native form has its reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from abyssal.kernels import adamw, gate, gemm, latent_attention, prefill_attention, rms_norm, rotary, row_sums, swiglu
from abyssal.kernels import fp8_entries as entries
from abyssal.kernels import fp8_tiles_native as tiles
from abyssal.kernels.matmul import product_dtype
from abyssal.kernels.native import native_library
from abyssal.kernels.race import contenders
from abyssal.precision.operand import values_dtype
from abyssal.spec.fp8_entry import Fp8Entry
from abyssal.spec.tile_format import TileFormat

NATIVE, PYTORCH = "native", "PyTorch"
ROW_INVARIANT = "a token's bits are the same in any batch"
"""What ``row-invariant`` means in the reasons."""

Chosen = str | Callable[[], bool] | None
"""An implementation, or a call that tells whether the native one applies; None where the operator is not used."""


@dataclass(frozen=True)
class Operator:
    """What runs for one operator; None where it is not used."""

    name: str
    training: str | None
    inference: str | None
    why: str
    """First of training, then of inference, where they differ."""


def operators() -> list[Operator]:
    """Every operator on CPU."""
    products = f"{PYTORCH} in {_name(product_dtype(torch.empty(0, dtype=torch.bfloat16)))}"
    emulated = f"{PYTORCH} in {_name(values_dtype(torch.bfloat16, TileFormat()))}"
    return [
        _operator("matrix products", products, _gemm, "BLAS; row-invariant"),
        _operator("products by expert", products, _grouped_gemm, "BLAS; row-invariant"),
        _operator("attention", PYTORCH, _prefill, "blocks; row-invariant"),
        _operator("attention over latents", PYTORCH, _latent, "autograd; reads pages"),
        _operator("whole layer, decoding", None, _library, "forty operators at once"),
        _operator("RMSNorm", _rms_norm, _rms_norm, "one pass over memory"),
        _operator("SwiGLU", _swiglu, _swiglu, "one pass over memory"),
        _operator("rotary positions", PYTORCH, _rotary, "autograd; row-invariant"),
        _operator("gate", PYTORCH, _gate, "autograd; row-invariant"),
        _operator("sums over experts", _row_sums, _row_sums, "one pass over memory"),
        _operator("AdamW, FP32 moments", PYTORCH, None, "torch's fused kernel"),
        _operator("AdamW, BF16 moments", _adamw, None, "one pass over memory"),
        _operator("draws", None, _race, "FP32 tells who cannot win"),
        _operator("FP8 cache entries", None, _fp8_entry, "one pass over memory"),
        _operator("FP8 quantisation", _fp8_tiles, _fp8_tiles, "one pass over memory"),
        _operator("FP8 products", emulated, _gemm, "emulated by values"),
    ]


def _operator(name: str, training: Chosen, inference: Chosen, why: str) -> Operator:
    found = _implementation(training), _implementation(inference)
    lost = any(callable(each) and what != NATIVE for each, what in zip((training, inference), found, strict=True))
    return Operator(name, found[0], found[1], "no native form here" if lost else why)


def _implementation(chosen: Chosen) -> str | None:
    if chosen is None or isinstance(chosen, str):
        return chosen
    try:
        return NATIVE if chosen() else PYTORCH
    except RuntimeError:  # the library is of another version, which `abyssal doctor` says of the machine
        return PYTORCH


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "FP32", torch.bfloat16: "BF16"}[dtype]


# ---- one call of each, on a few numbers ----


def _library() -> bool:
    return native_library() is not None


def _gemm() -> bool:
    return gemm.try_native(torch.ones(2, 8), torch.ones(4, 8), None, torch.float32) is not None


def _grouped_gemm() -> bool:
    return gemm.try_native(torch.ones(2, 8), torch.ones(2, 4, 8), [1, 1], torch.float32) is not None


def _prefill() -> bool:
    x_BSHQ = torch.ones(1, 2, 1, 8)
    return prefill_attention.prefill_attention(x_BSHQ, x_BSHQ, x_BSHQ, 1.0) is not None


def _latent() -> bool:
    return latent_attention.native(torch.ones(1, 1, 1, 8), torch.ones(1, 2, 8), 4, 1.0) is not None


def _rms_norm() -> bool:
    return rms_norm.native(torch.ones(2, 8), torch.ones(8), 1e-6) is not None


def _swiglu() -> bool:
    forward = swiglu.native(torch.ones(2, 8), None)
    return forward is not None and swiglu.native_backward(torch.ones(2, 8), None, torch.ones(2, 4)) is not None


def _rotary() -> bool:
    return rotary.native(torch.ones(2, 8), torch.ones(2, 4, dtype=torch.complex64), True) is not None


def _gate() -> bool:
    return gate.native(torch.zeros(2, 4), None, 2, 1, 1, False, True, 1.0) is not None


def _row_sums() -> bool:
    return row_sums.native(torch.ones(4, 8), torch.zeros(2, 2, dtype=torch.int64)) is not None


def _adamw() -> bool:
    step = adamw.AdamWStep(step=1, lr=0.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)
    moments = torch.zeros(8, dtype=torch.bfloat16)
    return adamw.native(torch.ones(8), torch.ones(8), moments, moments.clone(), step)


def _race() -> bool:
    zeros = np.zeros(1, np.int64)
    return contenders(np.zeros((1, 8), np.float32), zeros, np.ones(1), zeros, zeros, 0, 8) is not None


def _fp8_entry() -> bool:
    entry = Fp8Entry(runs=1, run_values=8)
    rows_NY = torch.zeros(1, entry.num_bytes, dtype=torch.uint8)
    return entries.native_write(rows_NY, torch.zeros(1, dtype=torch.int64), torch.ones(1, 8), entry)


def _fp8_tiles() -> bool:
    return tiles.quantise(torch.ones(2, 8), TileFormat()) is not None
