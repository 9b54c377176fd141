"""A small model of several layers, run whole on one rank and cut into stages on many: losses and gradients of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from abyssal.data.batch import Batch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.transformer import Transformer
from abyssal.parallel.dispatch.alltoall import AllToAllDispatcher
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.pipeline.chunk import MicroBatch, ModelChunk
from abyssal.parallel.pipeline.chunk_ends import Targets
from abyssal.parallel.pipeline.executor import Executor, Pair, one_after_the_other
from abyssal.parallel.pipeline.hidden import MeasuredDispatcher, StepTimes, Stopwatch
from abyssal.parallel.pipeline.messages import Boundary
from abyssal.parallel.pipeline.pair import OverlappedPair
from abyssal.parallel.pipeline.schedule import Schedule, schedule
from abyssal.spec.mesh import MeshSpec
from abyssal.train.balance import BalanceLosses
from abyssal.train.config import ParallelConfig, TrainConfig
from abyssal.train.loop import build_model
from abyssal.train.loss import packed_step, targets, training_loss
from abyssal.train.ranks import expert_share
from tests.support.many_ranks import CONFIG
from tests.support.many_ranks import SPEC as SMALL

SPEC = dataclasses.replace(SMALL, num_layers=8, mtp_depth=1)
MTP_WEIGHT = 0.3


@dataclass
class Found:
    """Of one step: sums over micro-batches, and what one of several ranks knows of it."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    """By micro-batch: of the main model and of each MTP depth."""
    balance: dict[tuple[int, int], float] = field(default_factory=dict)
    """By micro-batch and layer."""
    chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Expert ids, likewise."""
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add_pass(self, micro_batch: int, losses: Sequence[Any], step: Any) -> None:
        if losses:
            self.losses[micro_batch] = [float(loss) for loss in losses]
        self.balance.update({(micro_batch, layer): float(loss) for layer, loss in step.balance_losses.items()})
        self.chosen.update({(micro_batch, layer): one.expert_ids_TK for layer, one in step.routings.items()})


def batch(num_micro_batches: int, seed: int = 0, rows: int = 2) -> Batch:
    """Documents, and targets that are not learned, unevenly over the micro-batches of ``rows`` rows."""
    generator = np.random.default_rng((11, seed))
    columns, count = CONFIG.seq_len + 1 + SPEC.mtp_depth, rows * num_micro_batches
    cuts = generator.integers(1, columns, count)
    documents = tuple((int(cut), columns - int(cut)) for cut in cuts)
    trained_BX = generator.random((count, columns)) < generator.random((count, 1))
    return Batch(generator.integers(0, SPEC.vocab_size, (count, columns)), trained_BX, documents)


def balance_losses(num_micro_batches: int) -> BalanceLosses:
    assert SPEC.moe is not None
    return BalanceLosses(SPEC.moe, CONFIG.balance, 1 / num_micro_batches)


def whole(model: Transformer, given: Batch, num_micro_batches: int) -> Found:
    """The reference: micro-batch after micro-batch under one graph each."""
    found, counts = Found(), [aim.num_learned for aim in targets(given, SPEC.mtp_depth)]
    for number, part in enumerate(given.parts(len(given) // num_micro_batches)):
        loss = training_loss(model, part, MTP_WEIGHT, balance_losses(num_micro_batches), counts)
        loss.total.backward()
        found.add_pass(number, loss.parts, loss.step)
    found.gradients = take_gradients(model)
    return found


def take_gradients(model: Transformer) -> dict[str, Tensor]:
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return gradients


def micro_batches(
    model: Transformer,
    given: Batch,
    number: int,
    dispatcher: Dispatcher | None = None,
    counts: Sequence[int] | None = None,
    balance: BalanceLosses | None = None,
) -> list[MicroBatch]:
    """As a trainer makes them; counts and balance losses are the global batch's."""
    depths = model.spec.mtp_depth
    counts = counts or [aim.num_learned for aim in targets(given, depths)]
    balance = balance or balance_losses(number)
    made = []
    for part in given.parts(len(given) // number):
        length = part.tokens_BX.shape[1] - 1 - depths
        tokens_BX = torch.from_numpy(part.tokens_BX)
        made.append(
            MicroBatch(
                make_step=lambda part=part: packed_step(model, part, balance, dispatcher),
                inputs=[tokens_BX[:, depth : depth + length].flatten() for depth in range(depths + 1)],
                targets=[
                    Targets(aim.tokens_T, aim.learned_T, counts[depth], MTP_WEIGHT / depths if depth else 1.0)
                    for depth, aim in enumerate(targets(part, depths))
                ],
            )
        )
    return made


def boundary(model: Transformer, given: Sequence[MicroBatch], dtype: torch.dtype = torch.float64) -> Boundary:
    return Boundary([(len(one.inputs[0]), model.spec.hidden_size) for one in given], dtype, torch.device("cpu"))


def chunks_of(model: Transformer, plan: Schedule, rank: int) -> list[ModelChunk]:
    """An equal run of layers for each of the rank's stages."""
    each = model.spec.num_layers // plan.num_stages
    return [
        ModelChunk(model, range(stage * each, (stage + 1) * each), stage, plan.num_stages)
        for stage in plan.chunks[rank]
    ]


def on_a_rank(
    name: str, num_micro_batches: int, pair: Pair = one_after_the_other, config: TrainConfig = CONFIG, steps: int = 1
) -> list[Found]:
    """To be run by every worker: the whole model is here, and this rank's layers of it are used."""
    torch.manual_seed(0)
    model = build_model(SPEC, config)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    plan = schedule(name, size, num_micro_batches)
    chunks = chunks_of(model, plan, rank)
    group = distributed.group.WORLD if size > 1 else None
    executor = Executor(plan, rank, chunks, group, pair, timeout=100.0)
    try:
        return [run_step(executor, model, chunks, batch(num_micro_batches, step)) for step in range(steps)]
    finally:
        executor.close()


def run_step(executor: Executor, model: Transformer, chunks: Sequence[ModelChunk], given: Batch) -> Found:
    parts = micro_batches(model, given, executor.schedule.num_micro_batches)
    for chunk in chunks:
        chunk.begin(parts)
    executor.run(boundary(model, parts))
    found = Found()
    for chunk in chunks:
        for number, step in chunk.steps.items():
            found.add_pass(number, chunk.losses.get(number, ()), step)
    found.gradients = take_gradients(model)
    return found


def together(parts: Sequence[Found]) -> Found:
    """What the ranks found, as one: each pass is on one of them, gradients add up."""
    found = Found()
    for part in parts:
        for name in ("losses", "balance", "chosen"):
            mine, theirs = getattr(found, name), getattr(part, name)
            assert not mine.keys() & theirs.keys(), name
            mine.update(theirs)
        for name, gradient in part.gradients.items():
            found.gradients[name] = found.gradients.get(name, torch.zeros_like(gradient)) + gradient
    return found


def assert_same(found: Found, wanted: Found, tolerance: float = 1e-9, gradients: float = 1e-8) -> None:
    assert found.losses.keys() == wanted.losses.keys()
    for number, losses in wanted.losses.items():
        assert np.allclose(found.losses[number], losses, rtol=tolerance, atol=0), number
    assert found.balance.keys() == wanted.balance.keys()
    assert np.allclose([found.balance[key] for key in wanted.balance], [*wanted.balance.values()], rtol=tolerance)
    assert found.chosen.keys() == wanted.chosen.keys()
    assert all(torch.equal(found.chosen[key], ids) for key, ids in wanted.chosen.items())
    assert worst(found.gradients, wanted.gradients) < gradients


def worst(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference of any gradient over its largest value."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    return max(
        float((found[name] - one).abs().max() / one.abs().max().clamp_min(1e-300)) for name, one in wanted.items()
    )


@dataclass(frozen=True)
class OnMesh:
    """One way to train the model on stages and experts at once."""

    mesh: str = "pp=2,dp=2,ep=2"
    schedule: str = "dualpipe"
    overlapped: bool = True
    num_micro_batches: int = 4
    """Of each data-parallel rank."""


def on_a_mesh(case: OnMesh) -> tuple[Found, StepTimes, tuple[int, int]]:
    """To be run by every worker: its stages' layers, with its experts of each; its place in pipeline and experts."""
    spec = MeshSpec.parse(case.mesh)
    mesh = Mesh(spec)
    model = build_model(SPEC, CONFIG, expert_share(SPEC, ParallelConfig(mesh=case.mesh), spec, mesh.rank))
    stopwatch = Stopwatch()
    dispatcher = AllToAllDispatcher(model.placements(), mesh)
    plan = schedule(case.schedule, spec.pp, case.num_micro_batches)
    chunks = chunks_of(model, plan, mesh.place.stage)
    pair = OverlappedPair() if case.overlapped else one_after_the_other
    executor = Executor(plan, mesh.place.stage, chunks, mesh.pipeline, pair, stopwatch, timeout=100.0)
    try:
        whole_batch = batch(spec.dp * case.num_micro_batches)
        rows = len(whole_batch) // spec.dp
        own = whole_batch.part(mesh.place.data * rows, (mesh.place.data + 1) * rows)
        counts = [aim.num_learned for aim in targets(whole_batch, SPEC.mtp_depth)]
        balance = balance_losses(spec.dp * case.num_micro_batches)
        measured = MeasuredDispatcher(dispatcher, stopwatch)
        parts = micro_batches(model, own, case.num_micro_batches, measured, counts=counts, balance=balance)
        for chunk in chunks:
            chunk.begin(parts)
        times = executor.run(boundary(model, parts))
        found = Found()
        for chunk in chunks:
            for number, step in chunk.steps.items():
                place = mesh.place.data * case.num_micro_batches + number
                found.add_pass(place, chunk.losses.get(number, ()), step)
        found.gradients = take_gradients(model)
        return found, times, (mesh.place.data, mesh.place.expert)
    finally:
        executor.close()
        dispatcher.close()
        mesh.close()


def together_on_mesh(parts: Sequence[tuple[Found, StepTimes, tuple[int, int]]]) -> Found:
    """As :func:`together`; experts lie one after another over the ranks of an expert group."""
    num_experts = max(expert for *_, (_, expert) in parts) + 1
    for part, _, (_, expert) in parts:
        for name, gradient in part.gradients.items():
            if ".experts." in name:
                wide = gradient.new_zeros(num_experts * len(gradient), *gradient.shape[1:])
                wide[expert * len(gradient) : (expert + 1) * len(gradient)] = gradient
                part.gradients[name] = wide
    return together([part for part, *_ in parts])
