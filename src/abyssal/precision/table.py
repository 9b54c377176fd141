"""A recipe as tables to read: every product's operands, and everything that is kept or sent.  Free of torch.

The model does not read them; they say in words what it reads in :class:`~abyssal.precision.recipe.Recipe`, so that a
page about a recipe can be compared with the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from abyssal.precision.recipe import Accumulation, Product, Recipe
from abyssal.spec.tile_format import TileFormat

Row = tuple[str, ...]

PRODUCT_COLUMNS: Row = (
    "products",
    "x in Fprop",
    "W",
    "dy in Dgrad",
    "x in Wgrad",
    "dy in Wgrad",
    "added up",
    "kept of x",
)
OTHER_COLUMNS: Row = ("tensor", "format")
SUMS: dict[Accumulation, str] = {
    "float32": "in FP32",
    "promoted": "in 14 bits, moved to FP32 every 128",
    "tensor_core": "in 14 bits",
}
_ACTIVATIONS = {"parameter": "as the parameters", "float32": "FP32", "bfloat16": "BF16"}
_SWIGLU_OUTPUT: frozenset[Product] = frozenset({"shared.down", "experts.down"})


def form_name(form: TileFormat) -> str:
    """Such as ``E4M3 1×128, 2^k``, where 2^k says that scales are powers of two."""
    tile = "a tensor" if form.tile == "tensor" else form.tile.replace("x", "×")
    return f"{form.code.upper()} {tile}, {'2^k' if form.scale == 'ue8m0' else 'FP32'}"


def product_rows(recipe: Recipe) -> list[Row]:
    """Products with the same formats in one row, in the order of the model."""
    grouped: dict[Row, list[str]] = {}
    for name in get_args(Product):
        grouped.setdefault(_formats(recipe, name), []).append(name)
    return [(", ".join(names), *formats) for formats, names in grouped.items()]


def _formats(recipe: Recipe, name: Product) -> Row:
    entry = recipe.product(name)
    activation = _ACTIVATIONS[recipe.activations]
    if entry.fp8 is None:
        operand = "FP32" if entry.operands == "float32" else activation
        return (*(operand,) * 5, "in FP32", activation)
    formats = entry.fp8
    operands = (formats.input, formats.weight, formats.gradient, formats.turned_input, formats.turned_gradient)
    return (*map(form_name, operands), SUMS[formats.accumulation], _kept(recipe, name, formats.kept))


def _kept(recipe: Recipe, name: Product, form: TileFormat) -> str:
    if name == "out" and recipe.kept_after_attention is not None:
        return form_name(recipe.kept_after_attention)
    if name in _SWIGLU_OUTPUT and recipe.kept_swiglu is not None:
        return "nothing: made again"
    return form_name(form)


def other_rows(recipe: Recipe) -> list[Row]:
    """What is no operand of a product."""
    activation = _ACTIVATIONS[recipe.activations]

    def name(form: TileFormat | None) -> str:
        return activation if form is None else form_name(form)

    return [
        ("residual stream, norms, attention, embedding", activation),
        ("what attention keeps of its output", name(recipe.kept_after_attention)),
        ("what shared and routed experts keep of SwiGLU's input", name(recipe.kept_swiglu)),
        ("tokens sent to experts (dispatch); gradients sent to experts (backward of combine)", name(recipe.dispatch)),
        ("what comes back from experts (combine); gradients that come back (backward of dispatch)", activation),
    ]


def markdown(recipe: Recipe) -> str:
    """Both tables."""
    tables = (PRODUCT_COLUMNS, product_rows(recipe)), (OTHER_COLUMNS, other_rows(recipe))
    return "\n\n".join("\n".join(_lines(columns, rows)) for columns, rows in tables)


def _lines(columns: Row, rows: Sequence[Row]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows)]
