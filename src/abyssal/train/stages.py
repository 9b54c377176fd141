"""A run's pipeline laid out: which layers are on which stage, which stages on which rank, in which order they work."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.model.part import ModelPart, cut_layers
from abyssal.parallel.holders import Holders
from abyssal.parallel.pipeline.schedule import Schedule, schedule
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.model import ModelSpec
from abyssal.train.config import TrainConfig


@dataclass(frozen=True)
class PipelinePlan:
    """The pipeline of a run."""

    stages: tuple[range, ...]
    """The layers of each."""
    chunks: tuple[tuple[int, ...], ...]
    """By pipeline rank, its stages."""
    holders: Holders
    schedules: dict[int, Schedule]
    """By the number of micro-batches of a step."""

    def part(self, stage_rank: int) -> ModelPart:
        """What the pipeline rank ``stage_rank`` holds."""
        return self.holders.parts[stage_rank]

    @property
    def any_schedule(self) -> Schedule:
        return next(iter(self.schedules.values()))


def plan_pipeline(spec: ModelSpec, config: TrainConfig, mesh: MeshSpec) -> PipelinePlan | None:
    """The pipeline that a run's options ask for; None for one stage.

    Raises:
        ValueError: layers that do not divide over the stages, or micro-batches that the schedule does not take.
    """
    if mesh.pp == 1:
        return None
    parallel = config.parallel
    if config.micro_batch_size is None:
        raise ValueError(
            f"mesh pp is {mesh.pp}, but micro_batch_size is not set: a pipeline is filled by many micro-batches; give "
            "--micro-batch-size"
        )
    rows = sorted(set(config.plan(mesh.dp).num_rows))
    counts = [number // (mesh.dp * config.micro_batch_size) for number in rows]
    schedules = {count: schedule(parallel.schedule, mesh.pp, count) for count in counts}
    one = next(iter(schedules.values()))
    stages = cut_layers(spec.num_layers, one.num_stages, parallel.stage_layers)
    return PipelinePlan(stages, one.chunks, Holders(spec, stages, one.chunks), schedules)
