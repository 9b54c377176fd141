"""What this machine can do at best: the yardsticks beside which figures are put."""

from __future__ import annotations

import torch

from .record import seconds

PRODUCTS = ((2048, 512, 512), (2048, 512, 1408), (2048, 2048, 2048))
"""Rows, inputs, outputs: large, and of the small presets' size."""


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's product, the best of several shapes."""
    best = 0.0
    for m, k, n in PRODUCTS:
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        best = max(best, 2 * m * k * n / min(seconds(lambda a=a, b=b: a @ b) for _ in range(10)) / 1e9)
    return best


def memory_bandwidth() -> float:
    """GB/s at which torch sums 1 GiB."""
    array = torch.ones(1 << 28)
    return array.numel() * 4 / min(seconds(array.sum) for _ in range(10)) / 1e9
