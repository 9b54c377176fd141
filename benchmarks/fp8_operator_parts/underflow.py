"""What one outlier does to everything else: one scale a tensor against 1x128 tiles [V3 section 3.3.2].

A scale follows the largest value it is for.  Under one scale a tensor an outlier pushes all other values towards the
smallest codes and below; under tiles, the 127 beside it.  Values are normal, and the outlier is so many times their
standard deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import quantise
from abyssal.spec.tile_format import TileFormat

FORMS = {
    "one scale, E4M3": TileFormat("e4m3", "tensor", "float32"),
    "one scale, E5M2": TileFormat("e5m2", "tensor", "float32"),
    "1x128, E4M3": TileFormat("e4m3", "1x128", "float32"),
    "1x128, E4M3, powers of two": TileFormat("e4m3", "1x128", "ue8m0"),
}


def measure(rows: int, columns: int, outliers: tuple[float, ...], seed: int = 0) -> list[dict[str, Any]]:
    """A record a format and size of the outlier: how the other values fare."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    others = torch.ones_like(values, dtype=torch.bool)
    others[rows // 2, columns // 2] = False
    records = []
    for outlier in outliers:
        x = torch.where(others, values, outlier)
        for name, form in FORMS.items():
            back = quantise(x, form).values(torch.float64)
            records.append(
                {
                    "format": name,
                    "outlier": outlier,
                    "flushed": float(((back == 0) & (x != 0))[others].double().mean()),
                    "error": relative_error(back[others], x.double()[others]),
                }
            )
    return records


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| over |exact|, of whole tensors."""
    return float((found - exact).norm() / exact.norm())


def tell(records: list[dict[str, Any]]) -> None:
    """Share of values that become zero, and error of all but the outlier."""
    outliers = sorted({record["outlier"] for record in records})
    print("\nOne outlier: other values flushed to zero (relative error of all of them)")
    print(f"{'':<28}" + "".join(f"{f'{outlier:,.0f} sigma':>20}" for outlier in outliers))
    for name in FORMS:
        row = [record for record in records if record["format"] == name]
        cells = [f"{each['flushed']:.2%} ({each['error']:.1%})" for each in row]
        print(f"{name:<28}" + "".join(f"{cell:>20}" for cell in cells))
