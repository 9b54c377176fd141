"""What is lost in Hopper's accumulation, by the length of the sum, with and without promotion [V3 section 3.3.2].

Both operands are quantised once with one scale a tensor, and every way of adding up sees the same codes: errors are
those of the sum alone, against FP64.  The report does not say what its matrices were nor what its error is relative to.
Two kinds of matrices are taken here.  Normal ones, whose outputs lie around zero, so that no output by itself is a
measure of anything: errors are relative to the outputs' root mean square.  And uniform ones in [0, 1), whose sums only
grow: each error is relative to its own output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.fp8_gemm import Summation, gemm
from abyssal.kernels.fp8_tiles import quantise
from abyssal.spec.tile_format import TileFormat

FORM = TileFormat("e4m3", "tensor", "float32")
SUMMATIONS: tuple[Summation, ...] = ("float32", "promoted", "tensor_core")
MATRICES: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "uniform": torch.rand}


def measure(size: int, lengths: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    """A record a kind of matrices, length of the sum and way of adding up, of ``size`` x ``size`` outputs."""
    records = []
    for kind, make in MATRICES.items():
        for length in lengths:
            generator = torch.Generator().manual_seed(seed)
            a, b = (quantise(make(size, length, generator=generator), FORM) for _ in range(2))
            exact = gemm(a, b, torch.float64, "float64")
            unit = exact if kind == "uniform" else exact.square().mean().sqrt()
            for summation in SUMMATIONS:
                begin = time.process_time()
                found = gemm(a, b, torch.float32, summation)
                seconds = time.process_time() - begin
                error = (found.double() - exact) / unit
                records.append(
                    {
                        "matrices": kind,
                        "length": length,
                        "summation": summation,
                        "largest": float(error.abs().max()),
                        "root_mean_square": float(error.square().mean().sqrt()),
                        "mean": float(error.mean()),
                        "processor_seconds": seconds,
                    }
                )
    return records


def tell(records: list[dict[str, Any]]) -> None:
    """Largest error of each."""
    lengths = sorted({record["length"] for record in records})
    print("\nAccumulation: largest error (root mean square), one scale a tensor, both operands the same codes")
    print(f"{'':<24}" + "".join(f"{f'K = {length}':>20}" for length in lengths))
    for kind in MATRICES:
        for summation in SUMMATIONS:
            row = [record for record in records if (record["matrices"], record["summation"]) == (kind, summation)]
            cells = [f"{each['largest']:.1e} ({each['root_mean_square']:.1e})" for each in row]
            print(f"{kind + ', ' + summation:<24}" + "".join(f"{cell:>20}" for cell in cells))
    longest = [record for record in records if record["length"] == lengths[-1]]
    seconds = {
        name: min(each["processor_seconds"] for each in longest if each["summation"] == name) for name in SUMMATIONS
    }
    print(
        f"Processor time at K = {lengths[-1]}: "
        + ", ".join(f"{name} {taken * 1000:.0f} ms" for name, taken in seconds.items())
        + f"; emulation {seconds['promoted'] / seconds['float32']:.0f} times as long as a product in FP32"
    )
