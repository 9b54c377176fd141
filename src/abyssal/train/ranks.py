"""What a step needs of the other data-parallel ranks: its share of the rows, and sums over all of them.

Every method of :class:`DataRanks` is called by all ranks together, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed

from abyssal.model.dispatch import DispatchPlan, Handle
from abyssal.model.part import ModelPart
from abyssal.model.share import ExpertShare
from abyssal.parallel.dispatch.choose import RankDispatcher
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.placement import initial_placement
from abyssal.parallel.waiting import Waiting
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.model import ModelSpec
from abyssal.train.balance import Loads
from abyssal.train.config import ParallelConfig

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class _Timed(Generic[Result]):
    """A handle whose waits are counted."""

    handle: Handle[Result]
    waiting: Waiting

    def wait(self) -> Result:
        with self.waiting:
            return self.handle.wait()


class TimedDispatcher:
    """A dispatcher between ranks, of which what is waited for it is counted."""

    def __init__(self, dispatcher: RankDispatcher, waiting: Waiting) -> None:
        self.dispatcher = dispatcher
        self._waiting = waiting

    def plan(self, layer: int, expert_ids_TK: Tensor) -> DispatchPlan:
        return self.dispatcher.plan(layer, expert_ids_TK)

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, plan: Any
    ) -> Handle[tuple[Tensor, Tensor | None]]:
        return _Timed(self.dispatcher.start_dispatch(x_TD, weights_TK, plan), self._waiting)

    def start_combine(
        self, rows_AD: Tensor, weights_A: Tensor | None, plan: Any
    ) -> Handle[tuple[Tensor, Tensor | None]]:
        return _Timed(self.dispatcher.start_combine(rows_AD, weights_A, plan), self._waiting)


class SingleRank:
    """One rank, whose share is everything."""

    num_ranks = 1

    def __init__(self) -> None:
        self.waiting = Waiting()

    def share(self, first: int, count: int) -> tuple[int, int]:
        """This rank's part of ``count`` rows from ``first`` on: its first row, and how many."""
        return first, count

    def sum_over_rows(self, counts: list[int]) -> list[int]:
        """Of what each rank has of its own rows, whatever stage it is."""
        return counts

    def sum_counts(self, counts: list[int]) -> list[int]:
        return counts

    def sum(self, values: list[float]) -> list[float]:
        return values

    def sum_loads(self, loads: Loads) -> Loads:
        return loads

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """In place."""

    def texts(self, text: str) -> list[str]:
        """Each rank's."""
        return [text]


class DataRanks(SingleRank):
    """All ranks: the data-parallel ones share out the rows, those of a pipeline the layers."""

    def __init__(self, mesh: Mesh, experts: Mapping[int, int]) -> None:
        """``experts``: how many each layer has that has any, here or on another stage."""
        super().__init__()
        self._mesh = mesh
        self._experts = experts
        self.num_ranks = mesh.spec.dp

    def share(self, first: int, count: int) -> tuple[int, int]:
        each, left = divmod(count, self.num_ranks)
        assert not left, f"{count} rows for {self.num_ranks} ranks: the plan has as many for each"
        return first + each * self._mesh.place.data, each

    def sum_over_rows(self, counts: list[int]) -> list[int]:
        counted = torch.tensor(counts, dtype=torch.int64, device=self._mesh.device)
        return self._summed(counted, self._mesh.data).tolist()

    def sum_counts(self, counts: list[int]) -> list[int]:
        return self._summed(torch.tensor(counts, dtype=torch.int64, device=self._mesh.device)).tolist()

    def sum(self, values: list[float]) -> list[float]:
        return self._summed(torch.tensor(values, dtype=torch.float64, device=self._mesh.device)).tolist()

    def sum_loads(self, loads: Loads) -> Loads:
        """In one message for all layers."""
        if not self._experts:
            return loads
        parts = [
            loads[layer] if layer in loads else torch.zeros(number, dtype=torch.int64, device=self._mesh.device)
            for layer, number in self._experts.items()
        ]
        summed = self._summed(torch.cat(parts))
        return dict(zip(self._experts, summed.split(list(self._experts.values())), strict=True))

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._summed(tensor)

    def texts(self, text: str) -> list[str]:
        found: list[str] = [""] * distributed.get_world_size(self._mesh.control)
        distributed.all_gather_object(found, text, self._mesh.control)
        return found

    def _summed(self, tensor: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
        with self.waiting:
            distributed.all_reduce(tensor, group=group)
        return tensor


def check_fits(spec: ModelSpec, parallel: ParallelConfig, mesh: MeshSpec) -> None:
    """Refuse a mesh that the model's experts or the options do not fit.

    Raises:
        ValueError: naming the field, the sizes, and what to give.
    """
    extra = parallel.redundant_experts
    if spec.moe is None:
        if mesh.ep > 1:
            raise ValueError(f"mesh ep is {mesh.ep}, but the model has no experts; leave ep out")
        return
    experts = spec.moe.num_experts
    if experts % mesh.ep:
        raise ValueError(
            f"mesh ep is {mesh.ep}, which does not divide the model's {experts} experts; give a divisor of both them "
            f"and dp {mesh.dp}"
        )
    if (experts + extra) % mesh.ep:
        raise ValueError(
            f"redundant_experts is {extra}: {experts + extra} slots do not divide over ep {mesh.ep}; give a multiple "
            f"of {mesh.ep}"
        )
    if mesh.ep == 1 and (extra or parallel.rebalance_every):
        name = "redundant_experts" if extra else "rebalance_every"
        raise ValueError(f"{name} is {getattr(parallel, name)}, but ep is 1: every rank has all experts; leave it out")


def expert_share(
    spec: ModelSpec, parallel: ParallelConfig, mesh: MeshSpec, rank: int, part: ModelPart | None = None
) -> ExpertShare | None:
    """The experts that ``rank`` begins with, of the layers in ``part``; None for all."""
    if spec.moe is None or mesh.ep == 1:
        return None if part is None else ExpertShare({}, 0, part)
    moe_layers = [layer for layer in range(spec.num_layers) if spec.is_moe_layer(layer)]
    moe_layers += range(spec.num_layers, spec.num_layers + spec.mtp_depth)
    sizes = spec.moe.num_experts, parallel.redundant_experts, mesh.ep
    placement = initial_placement(*sizes, mesh.nodes_of_experts, spec.moe.num_groups)
    return ExpertShare(dict.fromkeys(moe_layers, placement), mesh.place(rank).expert, part)
