"""A dispatcher by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from abyssal.model.dispatch import Dispatcher
from abyssal.parallel.dispatch.alltoall import AllToAllDispatcher
from abyssal.parallel.dispatch.deepep import DeepEPDispatcher, load_deep_ep
from abyssal.parallel.dispatch.hierarchical import HierarchicalDispatcher
from abyssal.parallel.dispatch.links import Traffic
from abyssal.parallel.mesh import Mesh
from abyssal.spec.placement import Placement

DispatcherKind = Literal["alltoall", "hierarchical", "deepep"]


class RankDispatcher(Dispatcher, Protocol):
    """A dispatcher between ranks: what it sent is counted, its placements may change, and it is closed in the end."""

    traffic: Traffic
    placements: dict[int, Placement]

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Plan with ``placements`` from now on; on all ranks at the same point."""
        ...

    def close(self) -> None: ...


def open_dispatcher(
    kind: DispatcherKind, placements: Mapping[int, Placement], mesh: Mesh, chunk_tokens: int | None = None
) -> RankDispatcher:
    """The dispatcher of that name.

    Args:
        chunk_tokens: of the hierarchical one.

    Raises:
        ValueError: no such kind, or one that this machine or these placements do not allow.
    """
    if kind == "alltoall":
        return AllToAllDispatcher(placements, mesh)
    if kind == "hierarchical":
        return HierarchicalDispatcher(placements, mesh, chunk_tokens)
    if kind == "deepep":
        return DeepEPDispatcher(placements, mesh, load_deep_ep(mesh.device))
    raise ValueError(f"dispatch is {kind!r}; give one of {', '.join(get_args(DispatcherKind))}")
