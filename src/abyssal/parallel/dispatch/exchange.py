"""Uneven all-to-all of rows in one group of ranks: all that the dispatchers send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, distributed

from abyssal.parallel import all_to_all
from abyssal.parallel.all_to_all import Work
from abyssal.parallel.dispatch.links import LinkBytes
from abyssal.spec.mesh import MeshSpec

Result = TypeVar("Result")


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
        target = self._target(rows, received) if out is None else out
        return target, self._start([(target, rows)], sent, received, counted)

    def exchange_both(
        self, rows: Tensor, more: Tensor, sent: Sequence[int], received: Sequence[int], counted: LinkBytes
    ) -> tuple[Tensor, Tensor, Work | None]:
        """The same of two tensors with as many rows."""
        first, second = self._target(rows, received), self._target(more, received)
        return first, second, self._start([(first, rows), (second, more)], sent, received, counted)

    def _target(self, rows: Tensor, received: Sequence[int]) -> Tensor:
        return rows if self.size == 1 else rows.new_empty(sum(received), *rows.shape[1:])

    def _start(
        self, pieces: Sequence[tuple[Tensor, Tensor]], sent: Sequence[int], received: Sequence[int], counted: LinkBytes
    ) -> Work | None:
        for _, rows in pieces:
            size = rows.element_size() * math.prod(rows.shape[1:])
            counted.add([count * size for count in sent], self.nodes, self.rank)
        if self.size == 1:
            for target, rows in pieces:
                if target is not rows:
                    target.copy_(rows)
            return None
        return all_to_all.start([(target, rows.contiguous()) for target, rows in pieces], received, sent, self.group)


def finished(result: Result, work: Work | None) -> Result:
    """What a work brought, once it is done."""
    wait_for(work)
    return result


def wait_for(work: Work | None) -> None:
    """Wait, if there is anything to wait for."""
    if work is not None:
        work.wait()
