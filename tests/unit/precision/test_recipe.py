"""A recipe that cannot be is refused by name, whoever makes it: a table, switches, or a product's own formats."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from abyssal.precision.recipe import Fp8Options, ProductFormats, Recipe, fp8_recipe
from abyssal.spec.tile_format import TileFormat

E5M6 = TileFormat("e5m6")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TileFormat(code="e3m4"), "code is 'e3m4': choose one of e4m3, e5m2, e5m6"),  # type: ignore[arg-type]
        (lambda: TileFormat(tile="64x64"), "tile is '64x64': choose one of 1x128"),  # type: ignore[arg-type]
        (lambda: TileFormat(scale="e8"), "scale is 'e8': choose one of float32, ue8m0"),  # type: ignore[arg-type]
        (lambda: ProductFormats(weight=TileFormat(tile="1x128")), "weight has 1x128 tiles: its product wants 128x128"),
        (lambda: ProductFormats(turned_input=TileFormat()), "turned_input has 1x128 tiles: its product wants 128x1"),
        (lambda: ProductFormats(input=E5M6), "input is e5m6, which no tensor core multiplies"),
        (lambda: ProductFormats(accumulation="bf16"), "accumulation is 'bf16': choose one"),  # type: ignore[arg-type]
        (lambda: Recipe(dispatch=TileFormat(tile="128x128")), "dispatch has 128x128 tiles"),
        (lambda: Recipe(dispatch=E5M6), "dispatch is e5m6"),
        (lambda: Recipe(kept_swiglu=TileFormat(tile="tensor")), "kept_swiglu has tensor tiles"),
        (lambda: Recipe(high_precision=frozenset({"o"})), "no product is named 'o'"),  # type: ignore[arg-type]
        (lambda: Recipe(fp8=ProductFormats(), high_precision=frozenset({"head"})), "high_precision lacks gate, mtp"),
        (lambda: fp8_recipe().product("o"), "no product is named 'o'"),  # type: ignore[arg-type]
        (lambda: Fp8Options(high_precision=("o",)), "fp8.high_precision: no product is named 'o': choose among q, q_a"),
        (lambda: Fp8Options(scales="float32", accumulation="tensor_core"), "choose ue8m0 scales, one a tensor"),
        (lambda: Fp8Options(granularity="tensor", gradient_tile="128x128"), "gradient_tile is 128x128 .* has no tiles"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_one_scale_a_tensor_can_be_applied_after_any_sum() -> None:
    formats = fp8_recipe(Fp8Options(granularity="tensor", scales="float32", accumulation="tensor_core")).fp8
    assert formats is not None and formats.accumulation == "tensor_core" and formats.weight.tile == "tensor"


def test_a_recipe_is_known_by_the_same_text_in_every_process() -> None:
    """Pages on disk are found by it; a set's order changes with the seed of hashes."""
    code = "from abyssal.precision.recipe import fp8_recipe; print(fp8_recipe(recompute=('norm', 'swiglu')).identity())"
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout.decode()
        for seed in ("1", "2", "3")
    ]
    assert texts == [fp8_recipe(recompute=("swiglu", "norm")).identity() + "\n"] * 3
    assert texts[0] != fp8_recipe().identity() + "\n"
