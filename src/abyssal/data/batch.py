"""What a training step is given: rows of tokens, which of them are learned, and where attention must not look.

Every source of training data (packed pre-training text, packed conversations) is a :class:`RowStream`: rows numbered
from 0 over the whole run, each a pure function of the data, the seed and its number.  A step asks for the rows of its
global batch and a data-parallel rank for its part of them, so batches do not depend on the number of ranks and a
resumed run has nothing to restore but its position.

Legend: B rows (sequences), X tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Rows of one length X = seq_len + 1 + MTP depth.

    ``row[:seq_len]`` is the input, ``row[1:seq_len + 1]`` the next-token targets and ``row[1 + k:seq_len + 1 + k]``
    those of multi-token-prediction depth k.
    """

    tokens_BX: np.ndarray
    """int64."""
    trained_BX: np.ndarray | None = None
    """bool: whether a token is learned when it is the target; None learns all."""
    documents: tuple[tuple[int, ...], ...] | None = None
    """For each row, the lengths of the documents that attention must keep apart, adding up to X; None lets a token see
    the whole row before it [V3 section 4.1: packing without a mask across documents]."""

    def __len__(self) -> int:
        return len(self.tokens_BX)

    def part(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop``, such as a micro-batch or a rank's share."""
        rows = slice(start, stop)
        return Batch(
            self.tokens_BX[rows],
            None if self.trained_BX is None else self.trained_BX[rows],
            None if self.documents is None else self.documents[rows],
        )

    def take(self, numbers: Sequence[int]) -> Batch:
        """These rows, in this order; one may come several times."""
        return Batch(
            self.tokens_BX[list(numbers)],
            None if self.trained_BX is None else self.trained_BX[list(numbers)],
            None if self.documents is None else tuple(self.documents[number] for number in numbers),
        )

    def parts(self, size: int | None) -> list[Batch]:
        """The rows in micro-batches of ``size``, the last perhaps smaller; None takes all at once."""
        size = size or max(1, len(self))
        return [self.part(start, start + size) for start in range(0, len(self), size)]


class RowStream(Protocol):
    """An endless numbered sequence of rows."""

    @property
    def row_length(self) -> int:
        """X, tokens of a row."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when any row would: of the data, the seed, the mixing weights and the row length."""
        ...

    def rows(self, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count``."""
        ...

    def epoch(self, num_rows: int) -> float:
        """Passes over the data that the first ``num_rows`` rows make (the most over any source)."""
        ...
