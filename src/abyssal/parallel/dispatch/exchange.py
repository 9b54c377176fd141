"""Uneven all-to-all of rows in one group of ranks: the one collective that the dispatchers use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor, distributed

from abyssal.parallel.dispatch.links import LinkBytes
from abyssal.spec.mesh import MeshSpec

Result = TypeVar("Result")


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Peers:
    """A group of ranks, this rank's place among them, and the node of each."""

    def __init__(self, group: distributed.ProcessGroup, mesh: MeshSpec) -> None:
        self.group = group
        self.size = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        self.nodes = [mesh.node_of(rank) for rank in distributed.get_process_group_ranks(group)]

    def exchange(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], counted: LinkBytes, out: Tensor | None = None
    ) -> tuple[Tensor, Work | None]:
        """Start to send ``sent[r]`` rows to each peer r, in order, and to receive ``received[r]`` of each, in order.

        Returns:
            what will have been received once the work is waited for (None: it is there); in ``out`` where given.
        """
        size = rows.element_size() * math.prod(rows.shape[1:])
        counted.add([count * size for count in sent], self.nodes, self.rank)
        if self.size == 1:
            return (rows, None) if out is None else (out.copy_(rows), None)
        target = rows.new_empty(sum(received), *rows.shape[1:]) if out is None else out
        work = distributed.all_to_all_single(
            target, rows.contiguous(), list(received), list(sent), group=self.group, async_op=True
        )
        return target, work


def finished(result: Result, work: Work | None) -> Result:
    """What a work brought, once it is done."""
    wait_for(work)
    return result


def wait_for(work: Work | None) -> None:
    """Wait, if there is anything to wait for."""
    if work is not None:
        work.wait()
