"""The grid of ranks: pipeline stages by data-parallel ranks, the experts within the latter; a record free of torch.

    rank = pipeline · dp + data,        data = replica · ep + expert

So the ranks of one pipeline stage are numbered in a row, and within them the ``ep`` ranks among which one copy of the
experts is spread; ``dp / ep`` such expert groups hold the same experts.  V3 trains with 16 pipeline stages and 64-way
expert parallelism, without tensor parallelism [V3 section 3.2].

Ranks are on *nodes*, runs of ``ranks_per_node``: inside a node links are fast (NVLink), across nodes slow (InfiniBand).
An expert group lies on whole nodes, or several lie on one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_AXES = ("pp", "dp", "ep")


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the axes.

    Raises:
        ValueError: an axis below 1, experts that do not divide data, ranks that do not divide over nodes, or an expert
            group that begins or ends within a node that it shares.
    """

    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Data-parallel ranks of a stage."""
    ep: int = 1
    """Ranks among which a layer's experts are spread; a divisor of ``dp``."""
    ranks_per_node: int | None = None
    """None: all on one node."""

    def __post_init__(self) -> None:
        for axis in _AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh {axis} is {getattr(self, axis)}; give 1 or more")
        if self.dp % self.ep:
            raise ValueError(
                f"mesh ep is {self.ep}, which does not divide dp {self.dp}: experts are spread within the "
                f"data-parallel ranks; give ep one of {', '.join(map(str, divisors(self.dp)))}"
            )
        on_node = self.ranks_per_node
        if on_node is None:
            return
        if on_node < 1 or self.world_size % on_node:
            raise ValueError(
                f"mesh {self} has {self.world_size} ranks, which {on_node} ranks a node do not divide; give "
                "--ranks-per-node a divisor, or a mesh that fills its nodes"
            )
        if self.ep % on_node and on_node % self.ep:
            raise ValueError(
                f"mesh ep is {self.ep} with {on_node} ranks a node: an expert group lies on whole nodes, or several "
                "on one; give an ep that divides, or is divided by, the ranks of a node"
            )

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """From ``dp=4,ep=2``; an axis that is not named is 1.

        Raises:
            ValueError: what is not of that form, or :class:`MeshSpec` refuses.
        """
        sizes: dict[str, int] = {}
        for part in text.replace(" ", "").split(","):
            axis, _, size = part.partition("=")
            if axis not in _AXES or not size.isdecimal() or axis in sizes:
                raise ValueError(f"mesh is {text!r}: {part!r} is no axis and size; write it like pp=1,dp=4,ep=4")
            sizes[axis] = int(size)
        return cls(**sizes)

    def on_nodes(self, ranks_per_node: int) -> MeshSpec:
        """The same with so many ranks on each node."""
        return replace(self, ranks_per_node=ranks_per_node)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in _AXES if axis != "pp" or self.pp > 1)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    @property
    def num_nodes(self) -> int:
        return 1 if self.ranks_per_node is None else self.world_size // self.ranks_per_node

    @property
    def nodes_of_experts(self) -> int:
        """Nodes that an expert group lies on."""
        return 1 if self.ranks_per_node is None else max(1, self.ep // self.ranks_per_node)

    def place(self, rank: int) -> MeshPlace:
        """Where ``rank`` stands."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of {self.world_size}")
        stage, data = divmod(rank, self.dp)
        replica, expert = divmod(data, self.ep)
        return MeshPlace(rank, stage, data, replica, expert, self.node_of(rank))

    def node_of(self, rank: int) -> int:
        """The node of ``rank``, from 0."""
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def data_groups(self) -> list[list[int]]:
        """Ranks of each pipeline stage: they hold the same layers."""
        return [list(range(stage * self.dp, (stage + 1) * self.dp)) for stage in range(self.pp)]

    def expert_groups(self) -> list[list[int]]:
        """Ranks that hold one copy of the experts together: tokens travel within."""
        return [list(range(begin, begin + self.ep)) for begin in range(0, self.world_size, self.ep)]

    def replica_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts: these experts' gradients are summed over them."""
        return [
            list(range(stage[0] + expert, stage[-1] + 1, self.ep))
            for stage in self.data_groups()
            for expert in range(self.ep)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that one micro-batch passes through, by stage."""
        return [list(range(data, self.world_size, self.dp)) for data in range(self.dp)]

    def inside_groups(self) -> list[list[int]]:
        """Of each expert group, the ranks on one node: fast links."""
        return [
            [rank for rank in group if self.node_of(rank) == node]
            for group in self.expert_groups()
            for node in sorted({self.node_of(rank) for rank in group})
        ]

    def across_groups(self) -> list[list[int]]:
        """Of each expert group, the ranks of one index on its nodes: a token crosses between these, once a node."""
        groups = []
        for group in self.expert_groups():
            nodes = sorted({self.node_of(rank) for rank in group})
            by_node = [[rank for rank in group if self.node_of(rank) == node] for node in nodes]
            groups += [list(ranks) for ranks in zip(*by_node, strict=True)]
        return groups


@dataclass(frozen=True)
class MeshPlace:
    """A rank's place in the mesh, each from 0."""

    rank: int
    stage: int
    """Along ``pp``."""
    data: int
    """Along ``dp``."""
    replica: int
    """Which of the stage's expert groups it is in."""
    expert: int
    """Along ``ep``, within its expert group."""
    node: int


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})
