"""A named tensor of which each rank holds some rectangles: what checkpoints are saved from and loaded into.

A plain tensor in the same place of a dictionary stands for itself, whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A rectangle of a larger tensor."""

    offsets: tuple[int, ...]
    """Where it begins, by axis."""
    tensor: Tensor
    """Its values, the live ones; as many axes as the whole."""


@dataclass(frozen=True)
class Sharded:
    """What this rank holds of a tensor, none, one or several rectangles; together the ranks hold all of it, once."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    shards: tuple[Shard, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of this rank's shards."""
        return sum(shard.tensor.nbytes for shard in self.shards)
