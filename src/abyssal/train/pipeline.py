"""The pipeline of a step: this rank's chunks over the micro-batches, and a forward alone for held-out text.

Legend: B rows, X tokens of a row, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, distributed

from abyssal.data.batch import Batch
from abyssal.model.step import Step
from abyssal.model.transformer import ACTIVATION_DTYPES, Transformer
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.pipeline.chunk import MicroBatch, ModelChunk
from abyssal.parallel.pipeline.chunk_ends import Targets as Aim
from abyssal.parallel.pipeline.executor import Executor
from abyssal.parallel.pipeline.hidden import MeasuredDispatcher, StepTimes, Stopwatch
from abyssal.parallel.pipeline.messages import Boundary
from abyssal.parallel.pipeline.pair import OverlappedPair
from abyssal.train.balance import add_loads
from abyssal.train.loss import packed_step, targets
from abyssal.train.passes import Given, Sums
from abyssal.train.stages import PipelinePlan


class PipelineRuns:
    """What a rank of a pipeline runs of its model.

    Args:
        model: with the layers of this rank's stages.
    """

    def __init__(self, model: Transformer, mesh: Mesh, plan: PipelinePlan) -> None:
        self._model, self._mesh, self._plan = model, mesh, plan
        num_stages = len(plan.stages)
        self._chunks = [
            ModelChunk(model, plan.stages[stage], stage, num_stages) for stage in plan.chunks[mesh.place.stage]
        ]
        self._executors: dict[int, Executor] = {}
        self._stopwatch = Stopwatch()
        self.times: StepTimes | None = None
        """Of the last step."""

    def run(self, given: Given) -> Sums:
        """Forward and backward of all micro-batches, as the schedule orders them."""
        if given.dispatcher is not None:
            given = replace(given, dispatcher=MeasuredDispatcher(given.dispatcher, self._stopwatch))
        micro_batches = [self._micro_batch(given, part) for part in given.parts]
        for chunk in self._chunks:
            chunk.begin(micro_batches)
        self.times = self._executor(len(micro_batches)).run(self._boundary(given))
        return self._sums()

    def close(self) -> None:
        """End the threads."""
        for executor in self._executors.values():
            executor.close()

    def _boundary(self, given: Given) -> Boundary:
        width, extra = self._model.spec.hidden_size, 1 + len(self._model.mtp)
        shapes = [(len(part) * (part.tokens_BX.shape[1] - extra), width) for part in given.parts]
        return Boundary(shapes, self._dtype(), self._model.device)

    def _executor(self, count: int) -> Executor:
        if count not in self._executors:
            schedule = self._plan.schedules[count]
            group, pair = self._mesh.pipeline, OverlappedPair()
            rank, timeout = self._mesh.place.stage, self._mesh.timeout.total_seconds()
            self._executors[count] = Executor(schedule, rank, self._chunks, group, pair, self._stopwatch, timeout)
        return self._executors[count]

    def _micro_batch(self, given: Given, part: Batch) -> MicroBatch:
        model, depths = self._model, len(self._model.mtp)
        tokens_BX = torch.from_numpy(part.tokens_BX).to(model.device)
        length = tokens_BX.shape[1] - 1 - depths
        inputs = [tokens_BX[:, depth : length + depth].flatten() for depth in range(depths + 1)]
        weights = [1.0, *([given.mtp_weight / depths] * depths if depths else [])]
        aims = [
            Aim(
                aim.tokens_T.to(model.device),
                None if aim.learned_T is None else aim.learned_T.to(model.device),
                count,
                weight,
            )
            for aim, count, weight in zip(targets(part, depths), given.counts, weights, strict=True)
        ]
        return MicroBatch(lambda: packed_step(model, part, given.balance, given.dispatcher), inputs, aims)

    def _sums(self) -> Sums:
        sums = Sums([0.0] * (len(self._model.mtp) + 1))
        for chunk in self._chunks:
            for step in chunk.steps.values():
                add_loads(sums.loads, step.routings)
                sums.balance_loss += sum(float(loss) for loss in step.balance_losses.values())
            for losses in chunk.losses.values():
                sums.losses = [sum_ + float(loss) for sum_, loss in zip(sums.losses, losses, strict=True)]
            chunk.begin(())
        return sums

    # ---- held-out text ----

    def hidden(self, model: Transformer, tokens_BX: Tensor, step: Step) -> Iterator[Tensor] | None:
        """Hidden states of the main model and of each MTP depth on the rank of the last stage; None elsewhere."""
        depths = len(model.mtp)
        length = tokens_BX.shape[1] - 1 - depths
        route, own = self._plan.any_schedule.route(0), self._mesh.place.stage
        x_TD: Tensor | None = None
        for stage, rank in enumerate(route):
            if rank != own:
                continue
            if stage == 0:
                x_TD = model.embedded(tokens_BX[:, :length].flatten())
            elif route[stage - 1] != own:
                x_TD = self._received(len(tokens_BX) * length, route[stage - 1])
            assert x_TD is not None, "stages of a route are passed in order"
            for layer in self._plan.stages[stage]:
                x_TD = model.layers[layer](x_TD, step)
            if stage + 1 < len(route) and route[stage + 1] != own:
                assert x_TD is not None
                distributed.send(x_TD.contiguous(), self._rank(route[stage + 1]), group=self._mesh.pipeline)
        if route[-1] != own:
            return None
        assert x_TD is not None
        return self._depths(model, tokens_BX, model.norm(x_TD), step)

    def _depths(self, model: Transformer, tokens_BX: Tensor, hidden_TD: Tensor, step: Step) -> Iterator[Tensor]:
        """The last stage's: whole before any is given, as the other ranks of an expert group run theirs at once."""
        depths = len(model.mtp)
        length = tokens_BX.shape[1] - 1 - depths
        found = [hidden_TD]
        for depth in range(depths):
            inputs_T = tokens_BX[:, depth + 1 : length + depth + 1].flatten()
            found.append(model.mtp_hidden(depth, inputs_T, found[-1], step))
        return iter(found)

    def _received(self, num_tokens: int, rank: int) -> Tensor:
        model = self._model
        x_TD = torch.empty(num_tokens, model.spec.hidden_size, dtype=self._dtype(), device=model.device)
        distributed.recv(x_TD, self._rank(rank), group=self._mesh.pipeline)
        return x_TD

    def _dtype(self) -> torch.dtype:
        held = next(parameter for parameter in self._model.parameters() if not parameter.is_meta)
        return ACTIVATION_DTYPES.get(self._model.recipe.activations, held.dtype)

    def _rank(self, stage_rank: int) -> int:
        """The global rank of a pipeline rank."""
        return distributed.get_global_rank(self._mesh.pipeline, stage_rank)
