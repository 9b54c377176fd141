"""Some matrices whose gradients are reduced, and whose new values are gathered, in one message.

Both are started and finished apart, so that they travel while the backward, or the optimizer's other buckets, go on.
Where gloo carries them, a reduction is an exchange of pieces that each owner adds up in the order of ranks: as many
bytes as a reduce-scatter, and the same bits on every run whatever the timing.  NCCL has its own, in one kernel.

Legend: n ranks, s elements of a rank's stretch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from abyssal.parallel import all_to_all
from abyssal.parallel.all_to_all import Work
from abyssal.parallel.matrix import Matrix, lay_out
from abyssal.parallel.waiting import Waiting

# Torch 2.13 renames both, and warns of the names that older ones have alone.
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
_all_gather: Any = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


class Bucket:
    """Matrices that the ranks of ``group`` all hold and own in parts.

    Args:
        matrices: in the order in which gradients and targets are given.
        group: the ranks that share them out.
        wide: dtype of gradients and masters.
        stored: dtype of the model's parameters.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        group: distributed.ProcessGroup,
        wide: torch.dtype,
        stored: torch.dtype,
        device: torch.device,
        waiting: Waiting,
    ) -> None:
        self.matrices = tuple(matrices)
        self.wide, self.stored = wide, stored
        self._group, self._device, self._waiting = group, device, waiting
        self.num_ranks, self.rank = distributed.get_world_size(group), distributed.get_rank(group)
        self._layout = lay_out(self.matrices, self.num_ranks)
        self._stretch = max((row[-1].end for row in self._layout), default=0)
        self._by_kernel = device.type == "cuda"  # NCCL, though the name of a group that has gloo too is of both
        self._work: Work | None = None
        self._arriving: Tensor | None = None
        self._sending: Tensor | None = None
        self._gradients: list[Tensor] | None = None

    def own_rows(self, index: int) -> tuple[int, int]:
        """First row and end of this rank's part of matrix ``index``."""
        return self.matrices[index].rows(self.rank, self.num_ranks)

    # ---- gradients to their owners ----

    def start_reduce(self, gradients: Sequence[Tensor | None]) -> None:
        """Begin to sum the gradients of each matrix over the ranks; None is zero.  They are copied here."""
        if self.num_ranks == 1:
            self._gradients = [
                torch.zeros(matrix.shape, dtype=self.wide, device=self._device) if gradient is None else gradient
                for matrix, gradient in zip(self.matrices, gradients, strict=True)
            ]
            return
        shape = self.num_ranks, self._stretch
        sending_ns = torch.empty(shape, dtype=self.wide, device=self._device)
        for rank, stretches in enumerate(self._layout):
            for stretch, gradient in zip(stretches, gradients, strict=True):
                part = sending_ns[rank, stretch.begin : stretch.end]
                if gradient is None:
                    part.zero_()
                else:
                    part.copy_(gradient[stretch.first_row : stretch.end_row].reshape(-1))
        self._sending = sending_ns
        if self._by_kernel:
            self._arriving = torch.empty(self._stretch, dtype=self.wide, device=self._device)
            self._work = _reduce_scatter(self._arriving, sending_ns.view(-1), group=self._group, async_op=True)
        else:
            self._arriving = torch.empty(shape, dtype=self.wide, device=self._device)
            ones = [1] * self.num_ranks
            self._work = all_to_all.start([(self._arriving, sending_ns)], ones, ones, self._group)

    def finish_reduce(self) -> dict[str, Tensor]:
        """This rank's rows of each summed gradient, by the matrix's key."""
        if self.num_ranks == 1:
            gradients, self._gradients = self._gradients, None
            assert gradients is not None, "start_reduce comes first"
            return {matrix.key: gradient for matrix, gradient in zip(self.matrices, gradients, strict=True)}
        arrived = self._wait()
        if not self._by_kernel:
            total_s = arrived[0]
            for part_s in arrived[1:]:
                total_s += part_s
            arrived = total_s
        return self._own_views(arrived)

    def _own_views(self, stretch_s: Tensor) -> dict[str, Tensor]:
        return {
            matrix.key: stretch_s[own.begin : own.end].view(own.end_row - own.first_row, *matrix.shape[1:])
            for matrix, own in zip(self.matrices, self._layout[self.rank], strict=True)
        }

    # ---- new values to everyone ----

    def start_gather(self, masters: Mapping[str, Tensor]) -> None:
        """Begin to send this rank's rows of each master, by key, in the stored dtype."""
        sending_s = torch.empty(self._stretch, dtype=self.stored, device=self._device)
        for own, matrix in zip(self._layout[self.rank], self.matrices, strict=True):
            sending_s[own.begin : own.end].copy_(masters[matrix.key].reshape(-1))
        self._sending = sending_s
        if self.num_ranks == 1:
            self._arriving = sending_s
            return
        self._arriving = torch.empty(self.num_ranks, self._stretch, dtype=self.stored, device=self._device)
        self._work = _all_gather(self._arriving.view(-1), sending_s, group=self._group, async_op=True)

    @property
    def gathering(self) -> bool:
        """Whether :meth:`start_gather` has been called and :meth:`finish_gather` has not."""
        return self._arriving is not None

    @torch.no_grad()
    def finish_gather(self, targets: Sequence[Tensor]) -> None:
        """Write every rank's rows into ``targets``, one a matrix."""
        arrived_ns = self._wait().view(self.num_ranks, self._stretch)
        for stretches, arrived_s in zip(self._layout, arrived_ns, strict=True):
            for stretch, target in zip(stretches, targets, strict=True):
                rows = target[stretch.first_row : stretch.end_row]
                rows.copy_(arrived_s[stretch.begin : stretch.end].view_as(rows))

    def _wait(self) -> Tensor:
        arrived, work = self._arriving, self._work
        assert arrived is not None, "nothing is under way"
        if work is not None:
            with self._waiting:
                work.wait()
        self._work = self._arriving = self._sending = None
        return arrived


def grouped(sizes: Sequence[int], least: int) -> list[range]:
    """Runs of neighbours of at least ``least`` elements each, the last perhaps of fewer."""
    ends, total = [0], 0
    for index, size in enumerate(sizes):
        total += size
        if total >= least:
            ends.append(index + 1)
            total = 0
    if ends[-1] < len(sizes):
        ends.append(len(sizes))
    return [range(begin, end) for begin, end in pairwise(ends)]
