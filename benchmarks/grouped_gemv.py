"""How close the matrix products of decoding come to this machine's memory.

Prints, for one token at its experts, the speed at which each implementation reads weights, beside the speed at which
torch sums an array of 1 GiB (the machine's memory, by a kernel that does nothing else).  Slots change from call to call
and the stack is far larger than the caches, except in the rows marked "in cache".  The best of many calls: other work
on the machine slows a call and never speeds it up.

    python benchmarks/grouped_gemv.py [--threads N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from abyssal.kernels import grouped_gemv as op
from abyssal.kernels.native import isa_name, native_library

SHAPES = [  # label, slots, rows, outputs, inputs
    ("in cache, 512 x 512", 1, 1, 512, 512),
    ("in cache, 2048 x 1024", 1, 1, 2048, 1024),
    ("small: 4 of 32 experts, gate and up (in cache)", 32, 4, 512, 512),
    ("medium: 8 of 64 experts x 8 layers, gate and up", 512, 8, 640, 1024),
    ("V3: 8 of 16 experts, gate and up", 16, 8, 4096, 7168),
]


def seconds(function: Callable[[], object], calls: int) -> float:
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def memory_bandwidth() -> float:
    """GB/s at which torch sums 1 GiB."""
    array = torch.ones(1 << 28)
    return array.numel() * 4 / seconds(array.sum, 20) / 1e9


def measure(label: str, slots: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, object]:
    weight_EOI = torch.randn(slots, outputs, inputs, dtype=dtype)
    x_RI = torch.randn(rows, inputs, dtype=dtype)
    choices = itertools.cycle([torch.randperm(slots)[:rows] for _ in range(64)])
    size = rows * outputs * inputs * dtype.itemsize
    calls = max(10, min(300, int(1e9 / size)))

    def mv() -> None:
        for row, slot in enumerate(next(choices).tolist()):
            torch.mv(weight_EOI[slot], x_RI[row])

    result: dict[str, object] = {"shape": label, "dtype": str(dtype).removeprefix("torch."), "megabytes": size / 1e6}
    result["torch.mv GB/s"] = size / seconds(mv, calls) / 1e9
    if native_library() is not None:
        result["native GB/s"] = (
            size / seconds(lambda: op.native(x_RI, weight_EOI, next(choices), torch.float32), calls) / 1e9
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    bandwidth = memory_bandwidth()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    header = {
        "commit": commit,
        "machine": f"{platform.machine()}, {arguments.threads} threads, {isa_name() or 'no native library'}",
        "torch": torch.__version__,
        "memory GB/s": bandwidth,
    }
    print(*(f"{name}: {value}" for name, value in header.items()), sep="\n")
    print(f"{'':<48} {'dtype':>9} {'MB':>6} {'torch.mv':>9} {'native':>7} {'of memory':>9}   (GB/s)")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            row = measure(*shape, dtype)
            rows.append(row)
            native = float(str(row.get("native GB/s", "nan")))
            print(
                f"{row['shape']:<48} {row['dtype']:>9} {row['megabytes']:6.1f} {row['torch.mv GB/s']:9.1f} "
                f"{native:7.1f} {native / bandwidth:9.2f}",
                flush=True,
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "grouped_gemv.json"
    path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
