"""The machine's measured matrix-product peak, and the share of it that training reaches.

    share of peak = tokens a second x training FLOPs a token / peak

Counted as useful: the products of one forward and one backward pass (3 x the forward's), causal attention included,
the MTP modules too where they are trained, as :func:`abyssal.spec.arithmetic.training_flops_per_token` counts them.
Not counted: recomputation, norms, activations, the routing, the optimizer.  So the share is what is known as model
FLOPs utilisation, held against what this machine was seen to do rather than against a data sheet: a laptop has no data
sheet, and one core of a busy machine does not do what its data sheet says.

The peak is the best of a few square and model-like shapes in the dtype that the run computes in, on CPU with the
threads that training has.  A machine that is busy while it is measured gives a peak too low, and shares
too high; a longer measurement would cost every run what few need.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from abyssal.kernels.matmul import matmul

CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 512, 1408))
"""(rows, inner, columns): large enough for every core, small enough for a few milliseconds each."""
CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.3) -> float:
    """FLOP/s of the fastest matrix product found in about ``seconds``.

    Args:
        dtype: of both factors and the result.
        device: where.
        seconds: shared by the shapes; each is measured at least twice after one product to warm up.
    """
    device = torch.device(device)
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    timer = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    return max(_shape_peak(shape, dtype, device, timer, seconds / len(shapes)) for shape in shapes)


def share_of_peak(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """The share, 0 to 1.

    Args:
        flops_per_token: :func:`abyssal.spec.arithmetic.training_flops_per_token` at the run's sequence length, with
            ``include_mtp`` where the MTP modules are trained.
        peak: FLOP/s, from :func:`matmul_peak` in the dtype of the run's products.
    """
    return tokens_per_second * flops_per_token / peak


def _shape_peak(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    timer: Callable[[Callable[[], Tensor]], float],
    seconds: float,
) -> float:
    rows, inner, columns = shape
    generator = torch.Generator(device).manual_seed(0)  # not the run's; and noise, since GPUs multiply zeros faster
    left = torch.randn(rows, inner, dtype=dtype, device=device, generator=generator)
    right = torch.randn(inner, columns, dtype=dtype, device=device, generator=generator)

    def product() -> Tensor:
        return matmul(left, right)  # as training multiplies

    timer(product)
    end = time.perf_counter() + seconds
    best = min(timer(product), timer(product))
    while time.perf_counter() < end:
        best = min(best, timer(product))
    return 2 * rows * inner * columns / best


def _cpu_seconds(work: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _cuda_seconds(work: Callable[[], Tensor]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
