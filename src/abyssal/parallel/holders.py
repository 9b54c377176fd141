"""Which ranks hold each parameter, and the groups in which they share out its master.

Without a pipeline all ranks hold all parameters, but for experts.  With one, a stage's parameters are on the ranks that
run the stage: under DualPipe on two, which compute with the same values and whose gradients belong together; the
embedding is on the last stage too where MTP or a tied head reads it [V3 section 2.2: shared physically].  All of these
are data-parallel copies like any other, and ZeRO shares a parameter out among all of its holders.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed

from abyssal.model.lora import lora_parameters
from abyssal.model.part import ModelPart
from abyssal.model.transformer import Transformer
from abyssal.parallel.mesh import Mesh
from abyssal.spec.mesh import MeshPlace
from abyssal.spec.model import ModelSpec

Ranks = frozenset[int]


class Holders:
    """The pipeline ranks of each parameter.

    Args:
        stages: the layers of each stage.
        chunks: by pipeline rank, the stages that it runs.
    """

    def __init__(self, spec: ModelSpec, stages: Sequence[range], chunks: Sequence[Sequence[int]]) -> None:
        self._spec = spec
        self.parts = tuple(ModelPart.of(stages, held) for held in chunks)

    def ranks(self, parameter: str) -> Ranks:
        """Of the parameter of that name."""
        first, *rest = parameter.split(".")

        def held(part: ModelPart) -> bool:
            if first == "embed":
                return part.has_embedding(self._spec)
            return int(rest[0]) in part.layers if first == "layers" else part.end

        return frozenset(rank for rank, part in enumerate(self.parts) if held(part))

    def sets(self) -> list[Ranks]:
        """All that there are, in one order."""
        names = ["embed", "norm", *(f"layers.{layer}" for layer in range(self._spec.num_layers))]
        return sorted({self.ranks(name) for name in names}, key=sorted)


def trained_elsewhere(model: Transformer) -> set[str]:
    """Names of the parameters that other pipeline stages hold and train."""
    names = lora_parameters(model) or dict(model.named_parameters())
    return {name for name in names if model.get_parameter(name).is_meta}


class Sharing:
    """The groups among which masters are shared out."""

    def __init__(self, mesh: Mesh, holders: Holders | None = None) -> None:
        self._mesh, self._holders = mesh, holders
        self._data: dict[Ranks, distributed.ProcessGroup] = {}
        self._replicas: dict[Ranks, distributed.ProcessGroup] = {}
        spec = mesh.spec
        for held in () if holders is None else holders.sets():
            stages = [range(stage * spec.dp, (stage + 1) * spec.dp) for stage in sorted(held)]
            data = mesh.group([[rank for stage in stages for rank in stage]])
            by_expert = [[rank for stage in stages for rank in stage[expert :: spec.ep]] for expert in range(spec.ep)]
            replicas = mesh.group(by_expert)
            if data is not None and replicas is not None:
                self._data[held], self._replicas[held] = data, replicas

    @property
    def place(self) -> MeshPlace:
        """Of this rank."""
        return self._mesh.place

    def key(self, parameter: str) -> list[int]:
        """What the parameters that one group shares out have in common."""
        return [] if self._holders is None else sorted(self._holders.ranks(parameter))

    def group(self, parameter: str, is_expert: bool) -> distributed.ProcessGroup:
        """Among whose ranks it is shared out; experts among those that have the same ones at home."""
        if self._holders is None:
            return self._mesh.replicas if is_expert else self._mesh.data
        return (self._replicas if is_expert else self._data)[self._holders.ranks(parameter)]

    def is_first(self, parameter: str) -> bool:
        """Whether this rank speaks for the parameter's holders, of those of its place along ``ep``."""
        place = self._mesh.place
        stage = 0 if self._holders is None else min(self._holders.ranks(parameter))
        return place.stage == stage and place.replica == 0
