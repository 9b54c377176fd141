"""What quantising costs on this processor: each hot path of FP8 training on one thread, beside a copy of its input.

    python benchmarks/fp8_tiles.py [--rows 2048] [--columns 1408] [--repeats 40] [--results FOLDER]

For each path, from the least processor time of the repeats, whatever else the machine does: bytes of input a second;
bytes read and written a second beside those of a copy; and how many times longer PyTorch's definition takes, which the
C++ is bit for bit.  The second table has the operators that
a product's neighbours are fused with: the time in one pass beside that of SwiGLU or RMSNorm and of quantising, each in
its own C++ and a pass of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.record import RESULTS, announce, header, save
from torch import Tensor

from abyssal.kernels import fp8_rms_norm, fp8_swiglu
from abyssal.kernels import fp8_tiles_reference as reference
from abyssal.kernels.fp8_tiles import Quantised, quantise, quantise_with_values, round_trip, turn_values
from abyssal.spec.tile_format import TileFormat

ROWS, PACKED, COLUMNS, BLOCKS = TileFormat(), TileFormat("e5m6"), TileFormat(tile="128x1"), TileFormat(tile="128x128")
DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16}
Measured = tuple[str, int, Callable[[], object], Callable[[], object]]
"""Name, bytes of input, the operator and its definition."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=1408)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of fp8-tiles.json")
    chosen = parser.parse_args()
    if min(chosen.rows, chosen.columns, chosen.repeats) < 1:
        parser.error("--rows, --columns and --repeats are at least 1")
    torch.set_num_threads(1)
    about = header()
    announce(about)
    found: dict[str, Any] = {"paths": {}, "fused": {}}
    print(f"\n{'':<44}{'GB/s in':>8}{'in and out':>12}{'of a copy':>11}{'definition':>12}")
    for name, dtype in DTYPES.items():
        x = torch.randn(chosen.rows, chosen.columns).to(dtype)
        target = torch.empty_like(x)
        copy = 2 * x.nbytes / least(lambda target=target, x=x: target.copy_(x), chosen.repeats) / 1e9
        for path, size, run, define in paths(x):
            seconds = least(run, chosen.repeats)
            speed, times = size / seconds / 1e9, least(define, 2) / seconds
            moved = speed * (size + bytes_of(run())) / size
            figures = {"gb_per_second_in": speed, "gb_per_second_moved": moved, "of_a_copy": moved / copy}
            found["paths"][f"{name}, {path}"] = {**figures, "definition": times}
            print(f"{name + ', ' + path:<44}{speed:>8.2f}{moved:>12.2f}{100 * moved / copy:>9.0f} %{times:>10.0f} x")
    print(f"\n{'':<44}{'ms':>8}{'apart, ms':>11}{'ratio':>8}")
    for name, dtype in DTYPES.items():
        for path, run, apart in fused(chosen.rows, chosen.columns, dtype):
            together, separate = (1e3 * least(function, chosen.repeats) for function in (run, apart))
            found["fused"][f"{name}, {path}"] = {"ms": together, "apart_ms": separate}
            print(f"{name + ', ' + path:<44}{together:>8.2f}{separate:>11.2f}{together / separate:>8.2f}")
    data = {**about, "rows": chosen.rows, "columns": chosen.columns, **found}
    print(f"saved {save('fp8-tiles', data, chosen.results)}")
    return 0


def least(function: Callable[[], object], repeats: int) -> float:
    """The least processor time of this thread, in seconds."""
    function()
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        found.append(time.thread_time() - start)
    return min(found)


def bytes_of(result: object) -> int:
    """Of what an operator returned."""
    if isinstance(result, tuple):
        return sum(bytes_of(part) for part in result)
    return result.nbytes if isinstance(result, (Tensor, Quantised)) else 0


def paths(x: Tensor) -> list[Measured]:
    """Activations (codes and values), gradients (values alone), what Wgrad reads (turned), and weights."""
    dtype, columns, groups = x.dtype, x.shape[1], (len(x) // 3, len(x) - len(x) // 3)

    def defined(form: TileFormat, counts: tuple[int, ...] | None = None) -> Callable[[], Tensor]:
        return lambda: values_of(*reference.quantise(x, form, counts), form, counts)

    def values_of(codes: Tensor, scales: Tensor, form: TileFormat, counts: tuple[int, ...] | None = None) -> Tensor:
        return reference.dequantise(codes, scales, form, columns, dtype, counts)

    found: list[Measured] = [
        ("1x128 codes", x.nbytes, lambda: quantise(x, ROWS), lambda: reference.quantise(x, ROWS)),
        ("1x128 codes of E5M6", x.nbytes, lambda: quantise(x, PACKED), lambda: reference.quantise(x, PACKED)),
        ("1x128 codes and values", x.nbytes, lambda: quantise_with_values(x, ROWS, dtype), defined(ROWS)),
        ("1x128 values", x.nbytes, lambda: round_trip(x, ROWS, dtype), defined(ROWS)),
        ("128x1 values, 2 groups", x.nbytes, lambda: round_trip(x, COLUMNS, dtype, groups), defined(COLUMNS, groups)),
        ("128x128 codes and values", x.nbytes, lambda: quantise_with_values(x, BLOCKS, dtype), defined(BLOCKS)),
    ]
    for name, form in (("E4M3", ROWS), ("E5M6", PACKED), ("128x128 E4M3", BLOCKS)):
        kept = quantise(x, form)
        found.append((f"values of {name} codes", kept.nbytes, *_decoded(kept, dtype)))
        if form.tile == "1x128":
            found.append((f"{name} codes turned to 128x1 values", kept.nbytes, *_turned(kept, dtype)))
    return found


def _decoded(kept: Quantised, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    parts = kept.codes, kept.scales, kept.form, kept.columns
    return lambda: kept.values(dtype), lambda: reference.dequantise(*parts, dtype)


def _turned(kept: Quantised, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    def define() -> Tensor:
        values = reference.dequantise(kept.codes, kept.scales, kept.form, kept.columns, torch.float32)
        return reference.dequantise(*reference.quantise(values, COLUMNS), COLUMNS, kept.columns, dtype)

    return lambda: turn_values(kept, COLUMNS, dtype), define


def fused(rows: int, columns: int, dtype: torch.dtype) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, in one pass, apart."""
    gate_up, weights = torch.randn(rows, 2 * columns).to(dtype), torch.rand(rows)
    dh, norm = torch.randn(rows, columns).to(dtype), torch.ones(columns)
    forward = gate_up, weights, ROWS, ROWS, dtype
    kept = fp8_swiglu.swiglu_quantised(*forward)[0]
    again = kept, weights, COLUMNS, dtype
    gradients = kept, weights, dh, ROWS, COLUMNS, dtype
    normed = gate_up[:, :columns], norm, 1e-6, ROWS, dtype
    return [
        ("SwiGLU", lambda: fp8_swiglu.swiglu_quantised(*forward), lambda: fp8_swiglu.composed_forward(*forward)),
        ("SwiGLU again", lambda: fp8_swiglu.swiglu_again(*again), lambda: fp8_swiglu.composed_again(*again)),
        (
            "SwiGLU backward",
            lambda: fp8_swiglu.swiglu_gradients(*gradients),
            lambda: fp8_swiglu.composed_gradients(*gradients),
        ),
        ("RMSNorm", lambda: fp8_rms_norm.rms_norm_quantised(*normed), lambda: fp8_rms_norm.composed(*normed)),
    ]


if __name__ == "__main__":
    sys.exit(main())
