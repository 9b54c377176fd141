"""Loads the package's C++ library, if it was built.

``csrc/`` is compiled at installation into ``_native.so`` beside this file, with a plain C interface: ctypes calls it
without holding Python's lock, and one build serves every version of Python and torch.  A torch extension would give
the dispatcher and autograd, at the price of compiling against one exact torch; the operators here need neither.

Each function takes one packed record of 8-byte fields and returns a status.  ctypes converts arguments one by one, and
fifteen of them cost more than a small product; packing the same values with ``struct`` costs a third.

The library owns no threads.  It borrows torch's OpenMP team through ``GOMP_parallel``, which both GNU's and LLVM's
runtimes export on Linux, because a second pool would compete with torch's spinning workers for the same cores.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

ABI_VERSION = 15
"""What ``abyssal_abi_version()`` in ``csrc/`` must answer."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""``abyssal::Dtype`` of ``csrc/common.h``."""

OK, BAD_DTYPE, BAD_SLOT, BAD_SHAPE, NO_STORAGE = range(5)
"""``abyssal::Status`` of ``csrc/common.h``."""

ISA_NAMES = ("generic", "avx2", "avx512", "avx512_bf16")
"""Instruction sets that the kernels are written for, weakest first, as ``abyssal::Isa`` numbers them."""

FUNCTIONS = (
    "abyssal_gemm",
    "abyssal_rms_norm",
    "abyssal_rms_norm_backward",
    "abyssal_swiglu",
    "abyssal_swiglu_backward",
    "abyssal_row_sums",
    "abyssal_latent_attention",
    "abyssal_prefill_attention",
    "abyssal_adamw",
    "abyssal_gate",
    "abyssal_rotate",
    "abyssal_layer",
    "abyssal_fp8_write",
    "abyssal_fp8_read",
    "abyssal_fp8_quantise",
    "abyssal_fp8_dequantise",
    "abyssal_fp8_swiglu",
    "abyssal_fp8_swiglu_gradients",
    "abyssal_fp8_rms_norm",
    "abyssal_race",
    "abyssal_mass",
)
"""The operators; each is ``int32_t f(const void* record)``."""


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None, logged once, if this installation has none.

    Raises:
        RuntimeError: the library was built from other sources than these Python files.
    """
    path = Path(__file__).with_name("_native.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.info("native kernels are not available (%s): PyTorch runs instead, same results but slower", error)
        return None
    library.abyssal_abi_version.restype = ctypes.c_int32
    found = library.abyssal_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(f"{path} has interface {found}, expected {ABI_VERSION}; run `pip install -e .` again")
    for name in FUNCTIONS:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int32
    return library


@cache
def openmp_fork() -> int:
    """Address of the ``GOMP_parallel`` of the OpenMP runtime that torch runs on; 0 where it has none (macOS)."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def isa_name() -> str | None:
    """Instruction set that the native kernels use on this machine; None without the library."""
    library = native_library()
    return None if library is None else ISA_NAMES[library.abyssal_isa()]
