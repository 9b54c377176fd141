"""Dgrad with 128x128 blocks on the gradients against 1x128 tiles, on gradients captured from a training run.

The report found that 128x128 blocks on activation gradients diverge, and supposes that some tokens' gradients are far
larger than others', which a block then scales alike [V3 appendix B.2].  Here dx = dy W is computed from the captured dy
with both, in FP64 apart from the quantisation, and compared with the exact one, a token at a time: |dx - exact| over
|exact|; and of all tokens together.  Weights are in 128x128 blocks; what they contribute by themselves is beside.
Scales are powers of two.  Rows of an expert are quantised by themselves.

The first token of a sequence attends to itself alone whatever its query is: the gradient of its query is zero on paper
and FP32's rounding here.  It is left out where products make queries.

How uneven tokens would have to be is shown by making them so: in the gradients of one product, one token in 128 is
multiplied by a factor, and the errors of the others are told.

That a model diverges or does not is not measured here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.fp8_gemm import gemm_input
from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.spec.tile_format import TILE, TileFormat, TileName

from .capture import Captured

QUERIES = ("attention.q_a", "attention.q_b")
UNEVEN = "attention.out"
"""The product whose tokens are made uneven."""
WEIGHT = TileFormat("e4m3", "128x128", "ue8m0")
TILES: tuple[TileName, ...] = ("1x128", "128x128")


@dataclass(frozen=True)
class Products:
    """dx of one captured product: exact, and from what is quantised."""

    exact_TI: Tensor
    weights_TI: Tensor
    """With W alone quantised."""
    tiles_TI: dict[TileName, Tensor]
    """With W and dy quantised, dy in these tiles."""
    flushed: dict[TileName, float]
    """Share of dy's values that became zero."""


def quantised(dy_TO: Tensor, parts: int, tile: TileName) -> Quantised:
    """dy as Dgrad reads it, parts of the outputs with tiles of their own."""
    apart = dy_TO.unflatten(1, (parts, -1))
    return quantise(apart if tile == "1x128" else apart.transpose(0, 1), TileFormat("e4m3", tile, "ue8m0"))


def products(captured: Captured) -> Products:
    """Of all groups, in FP64."""
    exact, weights, tiles = [], [], defaultdict(list)
    flushed: dict[TileName, int] = defaultdict(int)
    for dy_TO, weight_OI in _groups(captured):
        codes = quantise(weight_OI.unflatten(0, (captured.parts, -1)), WEIGHT)
        exact.append(dy_TO.double() @ weight_OI.double())
        weights.append(dy_TO.double() @ codes.values(torch.float64).flatten(0, 1))
        for tile in TILES:
            dy = quantised(dy_TO, captured.parts, tile)
            tiles[tile].append(gemm_input(dy, codes, torch.float64, "float64"))
            flushed[tile] += int((dy.codes.float() == 0).sum()) - int((dy_TO == 0).sum())
    alive = max(int((captured.dy_TO != 0).sum()), 1)
    shares: dict[TileName, float] = {tile: flushed[tile] / alive for tile in TILES}
    return Products(torch.cat(exact), torch.cat(weights), {tile: torch.cat(tiles[tile]) for tile in TILES}, shares)


def _groups(captured: Captured) -> Iterator[tuple[Tensor, Tensor]]:
    for dy_TO, weight_OI in zip(captured.dy_TO.split(list(captured.counts)), captured.weights, strict=True):
        if len(dy_TO):
            yield dy_TO, weight_OI


def measure(taken: Iterable[Captured], seq_len: int) -> list[dict[str, Any]]:
    """A record a product, layer and step."""
    records = []
    for captured in taken:
        found = products(captured)
        told_T = torch.ones(len(captured.dy_TO), dtype=torch.bool)
        if captured.product in QUERIES:
            told_T[::seq_len] = False
        sizes_T = captured.dy_TO.norm(dim=1)
        records.append(
            {
                "product": captured.product,
                "layer": captured.layer,
                "step": captured.step,
                "rows": len(sizes_T),
                "largest_to_median_gradient": float(sizes_T.max() / sizes_T.median()),
                "weights": summary(found.weights_TI, found.exact_TI, told_T),
                **{
                    tile: {**summary(found.tiles_TI[tile], found.exact_TI, told_T), "flushed": found.flushed[tile]}
                    for tile in TILES
                },
            }
        )
    return records


def summary(dx_TI: Tensor, exact_TI: Tensor, told_T: Tensor) -> dict[str, float]:
    """Errors of the tokens in ``told_T``, and of all together."""
    error_T, size_T = (dx_TI - exact_TI).norm(dim=1), exact_TI.norm(dim=1)
    told_T = told_T & (size_T > 0)
    relative_T = error_T[told_T] / size_T[told_T]
    return {
        "tokens": int(told_T.sum()),
        "median": float(relative_T.median()),
        "ninety_ninth": float(relative_T.quantile(0.99)),
        "worst": float(relative_T.max()),
        "together": float(error_T.norm() / size_T.norm()),
    }


def uneven(taken: Iterable[Captured], factors: Iterable[float]) -> list[dict[str, Any]]:
    """A record a factor by which one token in 128 is larger: errors of the others, at the last layer and step."""
    captured = max((each for each in taken if each.product == UNEVEN), key=lambda each: (each.step, each.layer))
    records = []
    for factor in factors:
        dy_TO, others_T = captured.dy_TO.clone(), torch.ones(len(captured.dy_TO), dtype=torch.bool)
        dy_TO[TILE // 2 :: TILE] *= factor
        others_T[TILE // 2 :: TILE] = False
        found = products(replace(captured, dy_TO=dy_TO))
        errors = {tile: summary(found.tiles_TI[tile], found.exact_TI, others_T) for tile in TILES}
        records.append({"factor": factor, "product": captured.product, "layer": captured.layer, **errors})
    return records


def tell(records: list[dict[str, Any]]) -> None:
    """Medians over tokens and the worst token, of each layer's products: the worst of its steps."""
    print("\nDgrad on captured gradients: relative error of a token's dx, median (worst token), worst of the steps")
    header = ("weights alone", "1x128", "128x128", "flushed 1x128", "flushed 128x128", "largest/median dy")
    print(f"{'':<30}" + "".join(f"{name:>19}" for name in header))
    for layer, product in sorted({(record["layer"], record["product"]) for record in records}):
        rows = [record for record in records if (record["layer"], record["product"]) == (layer, product)]
        cells = [
            f"{max(row[name]['median'] for row in rows):.1%} ({max(row[name]['worst'] for row in rows):.1%})"
            for name in ("weights", *TILES)
        ]
        cells += [f"{max(row[tile]['flushed'] for row in rows):.2%}" for tile in TILES]
        cells.append(f"{max(row['largest_to_median_gradient'] for row in rows):.1f}")
        print(f"{f'layer {layer} {product}':<30}" + "".join(f"{cell:>19}" for cell in cells))


def tell_uneven(records: list[dict[str, Any]]) -> None:
    """Median and worst of the tokens that were not made larger."""
    product, layer = records[0]["product"], records[0]["layer"]
    print(f"\nOne token in 128 made larger, layer {layer} {product}: error of the others' dx, median (worst token)")
    print(f"{'':<12}" + "".join(f"{f'{factor:,.0f} times':>20}" for factor in (record["factor"] for record in records)))
    for tile in TILES:
        cells = [f"{record[tile]['median']:.1%} ({record[tile]['worst']:.1%})" for record in records]
        print(f"{tile:<12}" + "".join(f"{cell:>20}" for cell in cells))
