"""The recipe in words: complete, and the one in docs/fp8.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

from abyssal.precision.recipe import Fp8Options, Product, Recipe, fp8_recipe
from abyssal.precision.table import PRODUCT_COLUMNS, form_name, markdown, other_rows, product_rows
from abyssal.spec.tile_format import TileFormat

PAGE = Path(__file__).parents[3] / "docs" / "fp8.md"


def row_of(recipe: Recipe, product: str) -> dict[str, str]:
    (row,) = [row for row in product_rows(recipe) if product in row[0].split(", ")]
    return dict(zip(PRODUCT_COLUMNS, row, strict=True))


def test_the_page_has_the_recipe() -> None:
    """Write ``markdown(fp8_recipe())`` between the marks when the recipe changes."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- recipe")
    table = rest.partition("-->")[2].partition("<!-- end of recipe -->")[0]
    assert table.strip() == markdown(fp8_recipe())


def test_every_product_is_in_one_row() -> None:
    for recipe in (Recipe(), fp8_recipe(), fp8_recipe(Fp8Options(high_precision=("kv_b", "shared.down")))):
        named = [name for row in product_rows(recipe) for name in row[0].split(", ")]
        assert sorted(named) == sorted(get_args(Product))
        assert all(len(row) == len(PRODUCT_COLUMNS) for row in product_rows(recipe))


def test_the_paper_s_recipe() -> None:
    found = row_of(fp8_recipe(), "q_a")
    assert list(found.values())[1:] == [
        "E4M3 1×128, 2^k",
        "E4M3 128×128, 2^k",
        "E4M3 1×128, 2^k",
        "E4M3 128×1, 2^k",
        "E4M3 128×1, 2^k",
        "in FP32",
        "E4M3 1×128, 2^k",
    ]
    assert row_of(fp8_recipe(), "out")["kept of x"] == "E5M6 1×128, 2^k"
    assert row_of(fp8_recipe(), "experts.down")["kept of x"] == "nothing: made again"
    assert row_of(fp8_recipe(), "dense.down")["kept of x"] == "E4M3 1×128, 2^k"
    assert row_of(fp8_recipe(), "gate")["W"] == "FP32" and row_of(fp8_recipe(), "head")["W"] == "BF16"


def test_switches_show() -> None:
    options = Fp8Options(
        scales="float32",
        gradients="e5m2",
        gradient_tile="128x128",
        accumulation="promoted",
        high_precision=("kv_b",),
        after_attention="activation",
        swiglu_input="activation",
        dispatch="activation",
    )
    recipe = fp8_recipe(options)
    found = row_of(recipe, "out")
    assert found["W"] == "E4M3 128×128, FP32" and found["dy in Dgrad"] == "E5M2 128×128, FP32"
    assert found["dy in Wgrad"] == "E5M2 128×1, FP32" and found["x in Wgrad"] == "E4M3 128×1, FP32"
    assert found["added up"] == "in 14 bits, moved to FP32 every 128"
    assert found["kept of x"] == row_of(recipe, "experts.down")["kept of x"] == "E4M3 1×128, FP32"
    assert row_of(recipe, "kv_b")["W"] == "BF16"
    assert {form for _, form in other_rows(recipe)} == {"BF16"}
    assert form_name(TileFormat("e4m3", "tensor", "float32")) == "E4M3 a tensor, FP32"


def test_what_is_sent_and_kept_after_attention_has_powers_of_two_whatever_the_products_have() -> None:
    rows = {name: form for name, form in other_rows(fp8_recipe(Fp8Options(scales="float32")))}
    assert rows["what attention keeps of its output"] == "E5M6 1×128, 2^k"
    assert next(form for name, form in rows.items() if name.startswith("tokens sent")) == "E4M3 1×128, 2^k"


def test_the_table_is_free_of_torch() -> None:
    code = "import sys, abyssal.precision.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
