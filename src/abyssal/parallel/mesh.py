"""The mesh as process groups: what :class:`~abyssal.spec.mesh.MeshSpec` lays out, on ``torch.distributed``.

Every rank makes every group, in one order, and keeps those that it is in.  A mesh is an argument wherever it is needed;
several may live in one process, one after another, and :meth:`Mesh.close` takes its groups down again.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed

from abyssal.spec.mesh import MeshSpec

ProcessGroup = distributed.ProcessGroup


class Mesh:
    """This rank's groups in the process group that is initialised already.

    Args:
        spec: of as many ranks as there are.
        device: of the tensors that travel.
        timeout: after which a collective that a rank does not join fails.

    Attributes:
        data: the ranks of this pipeline stage.
        experts: those that hold one copy of the experts together.
        replicas: those that hold the same experts as this one.
        homes: those of ``experts`` once more, for what the optimizer sends while tokens travel.
        pipeline: the stages.
        inside, across: of the expert group, the ranks on this node, and those of this rank's index on its nodes.
        control: all ranks, over gloo, for what is no tensor of the model.

    Raises:
        ValueError: a mesh of another number of ranks.
    """

    def __init__(
        self, spec: MeshSpec, device: torch.device | str = "cpu", timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        world_size, rank = distributed.get_world_size(), distributed.get_rank()
        if spec.world_size != world_size:
            raise ValueError(
                f"mesh {spec} is of {spec.world_size} ranks and {world_size} were started; give a mesh whose pp x dp "
                f"is {world_size}, or start {spec.world_size} (torchrun --nproc-per-node)"
            )
        self.spec = spec
        self.device = torch.device(device)
        self.place = spec.place(rank)
        self._groups: list[ProcessGroup] = []
        self.timeout = timeout
        self.data = self._own(spec.data_groups())
        self.experts = self._own(spec.expert_groups())
        self.homes = self._own(spec.expert_groups())
        self.replicas = self._own(spec.replica_groups())
        self.pipeline = self._own(spec.pipeline_groups())
        self.inside = self._own(spec.inside_groups())
        self.across = self._own(spec.across_groups())
        self.control = self._own([list(range(world_size))], "gloo")

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: it writes and shows what is one for the whole run."""
        return self.place.rank == 0

    def _own(self, groups: list[list[int]], backend: str | None = None) -> ProcessGroup:
        own = self.group(groups, backend)
        assert own is not None, "every rank is in one group of each kind"
        return own

    def group(self, groups: list[list[int]], backend: str | None = None) -> ProcessGroup | None:
        """Make these groups, of which this rank is in one or in none; all ranks make them together."""
        own: ProcessGroup | None = None
        for ranks in groups:
            group = distributed.new_group(ranks, timeout=self.timeout, backend=backend)
            if self.place.rank in ranks:
                assert isinstance(group, ProcessGroup)
                own = group
                self._groups.append(group)
        return own

    def close(self) -> None:
        """Take the groups down; all ranks do so together."""
        for group in self._groups:
            distributed.destroy_process_group(group)
        self._groups.clear()
