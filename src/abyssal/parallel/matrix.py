"""What is spread over ranks: each parameter, or each logical expert's part of a stacked one, cut by rows.

Rank i of n owns rows R·i/n to R·(i+1)/n, rounded down, so the parts are rectangles, which any other mesh can read from
a checkpoint, and matrices need no padding of their own.  Several lie behind one another in one message: rank by rank,
each rank's part of each matrix in order, every rank's stretch as long as the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A parameter of one axis or two, or an expert's of one that is stacked by experts."""

    parameter: str
    """Its name in the model."""
    shape: tuple[int, ...]
    """Of the matrix: without the axis of experts."""
    expert: int | None = None
    """Logical."""
    num_experts: int | None = None
    """Of the layer."""

    @property
    def key(self) -> str:
        """A name of its own."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the parameter with all logical experts, as a checkpoint holds it."""
        return self.shape if self.num_experts is None else (self.num_experts, *self.shape)

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def rows(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """First row and end of what ``rank`` owns."""
        rows = self.shape[0]
        return rows * rank // num_ranks, rows * (rank + 1) // num_ranks

    def offsets(self, row: int) -> tuple[int, ...]:
        """Of a shard that begins at ``row``, within :attr:`whole_shape`."""
        within = (row, *(0 for _ in self.shape[1:]))
        return within if self.expert is None else (self.expert, *within)


@dataclass(frozen=True)
class Stretch:
    """Where one rank's rows of one matrix lie in a message, in elements from its rank's beginning."""

    begin: int
    first_row: int
    end_row: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + self.size


def lay_out(matrices: Sequence[Matrix], num_ranks: int) -> list[list[Stretch]]:
    """By rank and matrix."""
    layout = []
    for rank in range(num_ranks):
        begin, stretches = 0, []
        for matrix in matrices:
            first, end = matrix.rows(rank, num_ranks)
            stretches.append(Stretch(begin, first, end, (end - first) * matrix.row_size))
            begin = stretches[-1].end
        layout.append(stretches)
    return layout
