"""One optimizer step: forward and backward of each micro-batch, clip, AdamW, the biases' own update, the average.

On many ranks each rank is given its own rows of the global batch.  Losses are shares of the global batch's means, so
gradients add up; what a step knows of the whole batch (losses, expert counts) is summed over the ranks once, after its
last backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.shards import Sharded
from abyssal.data.batch import Batch
from abyssal.model.transformer import Transformer
from abyssal.parallel.dispatch.choose import RankDispatcher, open_dispatcher
from abyssal.parallel.holders import Sharing
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.placement import moves
from abyssal.parallel.placement_rebalancer import Rebalancer
from abyssal.parallel.zero import ShardedMasters
from abyssal.spec.placement import Placement
from abyssal.train.alarm import Starvation, StarvationAlarm
from abyssal.train.balance import BalanceLosses, Loads, max_violation, update_biases
from abyssal.train.config import TrainConfig
from abyssal.train.ema import HostAverage
from abyssal.train.fault import describe_fault
from abyssal.train.loss import targets
from abyssal.train.masters import Masters, WholeMasters, as_saved, untrained, untrained_parts
from abyssal.train.optimizer import AdamW, clip_gradients
from abyssal.train.passes import Given, run_passes
from abyssal.train.pipeline import PipelineRuns
from abyssal.train.ranks import DataRanks, SingleRank, TimedDispatcher
from abyssal.train.stages import PipelinePlan


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses in nats a token, before the update."""

    loss: float
    """Of the next token, the main model's."""
    mtp_losses: tuple[float, ...]
    """Of each MTP depth."""
    balance_loss: float
    """Sum over layers, coefficients included."""
    grad_norm: float
    """Before clipping."""
    lr: float
    mtp_weight: float
    bias_speed: float
    loads: Loads
    """Of the whole batch."""
    starved: tuple[Starvation, ...]
    """What has just raised the alarm."""
    ranks: RanksResult | None = None
    """What there was between ranks; None on one."""

    @property
    def violations(self) -> dict[int, float]:
        """MaxVio_batch of each layer."""
        return {layer: max_violation(load_E) for layer, load_E in self.loads.items()}

    @property
    def max_violation(self) -> float:
        """MaxVio_batch, averaged over layers."""
        return sum(self.violations.values()) / len(self.loads) if self.loads else 0.0


@dataclass(frozen=True)
class RanksResult:
    """What a step did between ranks."""

    waited: float
    """Seconds that this rank waited for others."""
    inside: int
    """Bytes of tokens sent within nodes, by all ranks together."""
    across: int
    """Bytes of tokens sent from node to node."""
    moved: int = 0
    """Slots that hold another expert from the next step on."""
    hidden: float | None = None
    """In a pipeline, the share of this rank's communication that passed under computation."""


class Trainer:
    """A model in training: its optimizer, its average, its plan, and where it stands.

    Args:
        model: with this rank's share of the experts.
        mesh: of many ranks; the trainer does not close it.
        dispatcher: in place of the config's; the trainer closes it.
        pipeline: the stages, where the model is one part of several.

    Attributes:
        plan: every step of the run.
        steps_done: steps taken so far.
        seconds: spent in them.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        mesh: Mesh | None = None,
        dispatcher: RankDispatcher | None = None,
        pipeline: PipelinePlan | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.mesh = mesh
        experts = {layer: placement.num_experts for layer, placement in model.placements().items()}
        self.ranks = SingleRank() if mesh is None else DataRanks(mesh, experts)
        self.pipeline = None if mesh is None or pipeline is None else PipelineRuns(model, mesh, pipeline)
        if dispatcher is None and mesh is not None and mesh.spec.ep > 1:
            parallel = config.parallel
            dispatcher = open_dispatcher(parallel.dispatch, model.placements(), mesh, parallel.dispatch_chunk)
        self._ranks_dispatcher = dispatcher
        self.dispatcher = None if dispatcher is None else TimedDispatcher(dispatcher, self.ranks.waiting)
        self.plan = config.plan(self.ranks.num_ranks)
        self.steps_done = 0
        self.seconds = 0.0
        self.masters: Masters = WholeMasters(model)
        if mesh is not None:
            sharing = Sharing(mesh, None if pipeline is None else pipeline.holders)
            movable = config.parallel.rebalance_every > 0
            self.masters = ShardedMasters(model, mesh, self.ranks.waiting, movable, sharing)
        self.optimizer = AdamW(self.masters.tensors, config.optimizer)
        averaged = dict(model.named_parameters()) if mesh is None else self.masters.tensors
        self.average = None if config.ema_decay is None else HostAverage(averaged, config.ema_decay)
        self.alarm = StarvationAlarm(config.balance.alarm_steps)
        self.rebalancer = None if mesh is None or dispatcher is None else _rebalancer(model, config, mesh)
        if model.spec.moe is not None:
            BalanceLosses(model.spec.moe, config.balance)  # refuses what does not fit before anything runs

    def step(self, batch: Batch) -> StepResult:
        """Train on the next step's batch: this rank's rows of it (:meth:`rows`).

        Raises:
            TrainingFault: a loss or gradient that is not finite or exploded; the parameters are as before the step.
        """
        config, planned = self.config, self.plan.step(self.steps_done)
        mtp_weight = config.mtp_weight * config.mtp_factor()(planned.share)
        losses, balance_loss, loads = self._backward(batch, mtp_weight)
        traffic = self._traffic()
        gradients = self.masters.gradients()
        norm_ = self.masters.norm(gradients)
        norm, total = float(norm_), sum(losses) + balance_loss
        if not (abs(total) < float("inf") and norm <= config.optimizer.largest_norm):
            parts = batch.parts(config.micro_batch_size)
            where = self.dispatcher, self.ranks, self.pipeline is None
            raise describe_fault(self.model, parts, planned.step, total, norm, gradients, *where)
        clip_gradients(gradients, norm_, config.optimizer.clip)
        lr = config.optimizer.learning_rate(planned.step, self.plan.num_steps, planned.share)
        speed = config.balance.bias_speed * config.balance.schedule()(planned.share)
        if self.average is not None:
            self.average.wait()
        self.optimizer.step(self.masters.tensors, gradients, lr)
        self.masters.publish()
        self.masters.zero_grad()
        update_biases(self.model, loads, speed)
        if self.average is not None:
            self.average.start()
        self.steps_done += 1
        starved = tuple(self.alarm.add(loads))
        ranks = None
        if traffic is not None:
            ranks = RanksResult(self.ranks.waiting.take(), *traffic, self._rebalance(loads), self._hidden())
        figures = losses[0], tuple(losses[1:]), balance_loss, norm, lr, mtp_weight, speed
        return StepResult(*figures, loads, starved, ranks)

    def _traffic(self) -> tuple[int, int] | None:
        """Bytes inside and across nodes that all ranks' tokens were since it was last asked."""
        if self.mesh is None:
            return None
        if self._ranks_dispatcher is None:
            return 0, 0
        traffic = self._ranks_dispatcher.traffic
        links = traffic.plan, traffic.dispatch, traffic.combine
        own = [sum(link.inside for link in links), sum(link.across for link in links)]
        traffic.reset()
        inside, across = self.ranks.sum_counts(own)
        return inside, across

    def _hidden(self) -> float | None:
        times = None if self.pipeline is None else self.pipeline.times
        return None if times is None else times.hidden_share

    def _rebalance(self, loads: Loads) -> int:
        """Place experts anew where that is due and worth it; how many slots hold another one."""
        if self.rebalancer is None:
            return 0
        self.rebalancer.add({layer: load_E.tolist() for layer, load_E in loads.items()})
        if not self.rebalancer.due(self.steps_done):
            return 0
        before = self.model.placements()
        changed = self.rebalancer.placements(before) or {}
        if changed:
            self.place(changed)
        return sum(moves(before[layer], placement) for layer, placement in changed.items())

    def rows(self, step: int) -> tuple[int, int]:
        """First row of the stream, and how many, that this rank trains on in ``step``."""
        planned = self.plan.step(step)
        return self.ranks.share(planned.first_row, planned.num_rows)

    def _backward(self, batch: Batch, mtp_weight: float) -> tuple[list[float], float, Loads]:
        """Forward and backward of each micro-batch: losses of main model and depths, balance loss, loads, all of the
        global batch."""
        depths = len(self.model.mtp)
        counts = self.ranks.sum_over_rows([aim.num_learned for aim in targets(batch, depths)])
        parts = batch.parts(self.config.micro_batch_size)
        balance = self._balance(1 / (len(parts) * self.ranks.num_ranks))
        if self.pipeline is None:
            given = Given(parts, counts, mtp_weight, balance, self.dispatcher)
            sums = run_passes(self.model, given, self.masters.arm)
        else:
            self.masters.wait()  # blocks are run stage by stage, which no hook on them sees
            sums = self.pipeline.run(Given(parts, counts, mtp_weight, balance, self._ranks_dispatcher))
            assert self.pipeline.times is not None
            self.ranks.waiting.seconds += self.pipeline.times.waiting
        *losses, balance_loss = self.ranks.sum([*sums.losses, sums.balance_loss])
        return losses, balance_loss, self.ranks.sum_loads(sums.loads)

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Let the experts' slots hold what ``placements`` says, from the next step on.  All ranks call it together.

        Raises:
            ValueError: a run on one rank, or a placement that does not fit its layer; nothing is changed then.
        """
        if not isinstance(self.masters, ShardedMasters) or self._ranks_dispatcher is None:
            raise ValueError("placements: all experts are on this rank; a mesh with ep above 1 has others to move to")
        if self.average is not None:
            self.average.wait()  # it reads masters, which may be what slots hold now
        self.masters.place(placements)
        self._ranks_dispatcher.place(self.model.placements())

    def _balance(self, scale: float) -> BalanceLosses | None:
        moe = self.model.spec.moe
        losses = None if moe is None else BalanceLosses(moe, self.config.balance, scale)
        return losses if losses is not None and losses.wanted else None

    def tensors(self, saving: bool = True) -> dict[str, Tensor | Sharded]:
        """Every tensor of the run's state, by a name that says what it is; the live ones, not copies.

        Parameters and biases, both moments, the average, and torch's generator.  On many ranks, what this rank gives to
        a checkpoint, or what it must be given from one: call :meth:`restore` then.
        """
        self.masters.wait()
        if self.average is not None:
            self.average.wait()
        return dict(self._tensors(saving))

    def _tensors(self, saving: bool) -> Iterator[tuple[str, Tensor | Sharded]]:
        if not isinstance(self.masters, ShardedMasters):
            rest: Mapping[str, Tensor | Sharded] = untrained(self.model)
        else:
            rest = untrained_parts(self.model, self.masters.sharing, saving)
        model = {**as_saved(self.masters, self.masters.tensors), **rest}
        for name in self.model.state_dict():
            yield f"model/{name}", _detached(model[name])
        optimizer = self.optimizer
        means, squares = as_saved(self.masters, optimizer.means), as_saved(self.masters, optimizer.squares)
        for name in means:
            yield f"optimizer/{name}/mean", means[name]
            yield f"optimizer/{name}/square", squares[name]
        for name, tensor in ({} if self.average is None else as_saved(self.masters, self.average.tensors)).items():
            yield f"average/{name}", tensor
        state = torch.get_rng_state()
        spoken_for = self.mesh is not None and saving and not self.mesh.is_first
        yield "generator/torch", Sharded(tuple(state.shape), state.dtype) if spoken_for else state

    def fields(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return {
            "steps_done": self.steps_done,
            "rows": self.plan.first_rows[self.steps_done],
            "tokens": self.plan.tokens_before(self.steps_done),
            "optimizer_steps": self.optimizer.steps,
            "seconds": self.seconds,
            "dry": {str(layer): counts for layer, counts in self.alarm.dry.items()},
            **({} if self.rebalancer is None else {"placed": self._placed(self.rebalancer)}),
        }

    def _placed(self, rebalancer: Rebalancer) -> dict[str, Any]:
        """Where experts are, and the loads by which they will be placed next."""
        slots = {str(layer): list(one.slots) for layer, one in self.model.placements().items()}
        return {"slots": slots, "num_ranks": rebalancer.num_ranks, **rebalancer.state()}

    def _place_again(self, rebalancer: Rebalancer, placed: Mapping[str, Any]) -> None:
        """Put experts where they were, if there are as many ranks and slots; their loads count anywhere."""
        rebalancer.load_state(placed)
        now = self.model.placements()
        before = {
            layer: Placement(one.num_experts, tuple(placed["slots"][str(layer)]), placed["num_ranks"])
            for layer, one in now.items()
        }
        if all(
            (one.num_slots, one.num_ranks) == (now[layer].num_slots, now[layer].num_ranks)
            for layer, one in before.items()
        ):
            self.place(before)

    def restore(self, fields: Mapping[str, Any], generator: Tensor) -> None:
        """Go on from a state whose other tensors have been filled in place (:meth:`tensors`).

        Raises:
            ValueError: a state after other rows than this run's plan has by then.
        """
        planned = self.plan.first_rows[fields["steps_done"]]
        if fields["rows"] != planned:
            raise ValueError(
                f"the checkpoint is after {fields['rows']:,} rows and {fields['steps_done']} steps of this run are "
                f"{planned:,}: a batch size that grows is rounded to whole micro-batches on every rank; resume on a "
                "mesh of the same dp, or with the micro_batch_size at which dp times it is what it was"
            )
        self.steps_done = fields["steps_done"]
        self.optimizer.steps = fields["optimizer_steps"]
        self.seconds = fields["seconds"]
        self.alarm.dry = {int(layer): list(counts) for layer, counts in fields["dry"].items()}
        torch.set_rng_state(generator)
        self.masters.publish()
        if self.rebalancer is not None and "placed" in fields:
            self._place_again(self.rebalancer, fields["placed"])

    def close(self) -> None:
        """End the threads and take the hooks off the model."""
        if self.pipeline is not None:
            self.pipeline.close()
        if self._ranks_dispatcher is not None:
            self._ranks_dispatcher.close()
        if isinstance(self.masters, ShardedMasters):
            self.masters.close()


def _rebalancer(model: Transformer, config: TrainConfig, mesh: Mesh) -> Rebalancer | None:
    parallel, moe = config.parallel, model.spec.moe
    if not parallel.rebalance_every or moe is None:
        return None
    sizes = mesh.spec.ep, mesh.spec.nodes_of_experts, moe.num_groups
    return Rebalancer(parallel.rebalance_every, parallel.redundant_experts, *sizes)


def _detached(tensor: Tensor | Sharded) -> Tensor | Sharded:
    return tensor if isinstance(tensor, Sharded) else tensor.detach()
