"""Low-precision formats: codes of few bits, and a scale for each tile of them [V3 section 3.3].

value = code x scale.  A tile's scale is its largest magnitude over the largest finite code, in FP32; a UE8M0 scale is
the next power of two that is not smaller.  Then no code overflows, and with a power of two the product is exact.

Tiles are named rows x columns: ``1x128`` for activations (a token, 128 channels), ``128x1`` for the same tensors where
a product sums over tokens, ``128x128`` for weights, ``tensor`` for one scale in all.  The last tile of an axis may be
ragged: it is what filling up with zeros would make it.

Free of torch, so that the planner can count bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

CodeName = Literal["e4m3", "e5m2", "e5m6"]
TileName = Literal["1x128", "128x1", "128x128", "tensor"]
ScaleName = Literal["float32", "ue8m0"]

TILE = 128
"""Values along an edge of a tile."""


@dataclass(frozen=True)
class Code:
    """A floating-point format of a sign, ``exponent_bits`` and ``mantissa_bits``, with subnormal numbers.

    E4M3 (OCP "FN") has no infinity, and only all ones is NaN.  E5M2 and E5M6 are FP16 with a shorter mantissa.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float
    """The largest finite number."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits


CODES: dict[CodeName, Code] = {
    "e4m3": Code(4, 3, 448.0),
    "e5m2": Code(5, 2, 57344.0),
    "e5m6": Code(5, 6, 65024.0),
}
SCALE_BYTES: dict[ScaleName, int] = {"float32": 4, "ue8m0": 1}


def tiles_along(length: int) -> int:
    """Tiles over ``length`` values, the last one ragged or whole."""
    return -(-length // TILE)


@dataclass(frozen=True)
class TileFormat:
    """How a tensor is quantised.

    Raises:
        ValueError: a name that there is not.
    """

    code: CodeName = "e4m3"
    tile: TileName = "1x128"
    scale: ScaleName = "ue8m0"

    def __post_init__(self) -> None:
        for name, known in (("code", CodeName), ("tile", TileName), ("scale", ScaleName)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(get_args(known))}")

    @property
    def largest(self) -> float:
        """The largest finite code."""
        return CODES[self.code].largest

    def code_columns(self, columns: int) -> int:
        """Elements of a row of codes as they are stored: E5M6 packs two values into three bytes."""
        return -(-columns // 2) * 3 if self.code == "e5m6" else columns

    def scale_shape(self, rows: int, columns: int, counts: Sequence[int] | None = None) -> tuple[int, ...]:
        """Shape of the scales of ``rows`` x ``columns`` values.

        Args:
            counts: with ``128x1``, the rows of each group: tiles begin anew with each.
        """
        if self.tile == "1x128":
            return rows, tiles_along(columns)
        if self.tile == "128x1":
            return sum(tiles_along(count) for count in (counts or (rows,))), columns
        return (tiles_along(rows), tiles_along(columns)) if self.tile == "128x128" else ()

    def num_bytes(self, rows: int, columns: int, counts: Sequence[int] | None = None) -> int:
        """Of codes and scales."""
        scales = 1
        for length in self.scale_shape(rows, columns, counts):
            scales *= length
        return rows * self.code_columns(columns) + scales * SCALE_BYTES[self.scale]
