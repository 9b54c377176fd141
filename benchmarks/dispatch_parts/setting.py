"""What is dispatched: tokens of V3's width, from ranks on nodes, by V3's node-limited routing of random scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.model.router import choose
from abyssal.precision.wire import bytes_per_token
from abyssal.spec.parts import MoESpec
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat

WIRE = TileFormat("e4m3", "1x128", "ue8m0")
"""In which tokens travel to experts [V3 section 3.3.3]; their sums come back in BF16."""
BF16_BYTES, WEIGHT_BYTES = 2, 4


@dataclass(frozen=True)
class Setting:
    """Of one run of ranks."""

    nodes: int
    ranks_per_node: int
    kept_nodes: int
    """Nodes that a token's experts may be on (M)."""
    tokens: int
    """Of each rank."""
    hidden: int
    experts: int = 256
    top_k: int = 8
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def moe(self) -> MoESpec:
        """The gate: a group of experts is a node's.

        Raises:
            ValueError: naming what does not fit.
        """
        if self.experts % self.ranks:
            raise ValueError(f"{self.experts} experts do not divide over {self.ranks} ranks")
        return MoESpec(self.experts, 0, self.top_k, 1, num_groups=self.nodes, num_kept_groups=self.kept_nodes)

    @property
    def placement(self) -> Placement:
        return Placement.identity(self.experts, self.ranks)

    @property
    def token_bytes(self) -> int:
        """Of a token on its way to experts."""
        return bytes_per_token(self.hidden, WIRE)

    def expert_ids(self, rank: int) -> Tensor:
        """(tokens, top_k) experts of the tokens of ``rank``."""
        scores_TE = torch.rand(self.tokens, self.experts, generator=self.generator(rank))
        return choose(scores_TE, None, self.moe)

    def generator(self, rank: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * self.ranks + rank)

    def __str__(self) -> str:
        return (
            f"{self.nodes} nodes x {self.ranks_per_node} ranks, {self.tokens} tokens of {self.hidden} a rank, "
            f"{self.top_k} of {self.experts} experts on at most {self.kept_nodes} nodes"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
