"""A small model trained on one rank and on many: what each case runs on a rank, and what of it is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from abyssal.checkpoint.shards import Sharded
from abyssal.data.batch import Batch
from abyssal.model.lora import LoraConfig, add_lora
from abyssal.model.step import Step
from abyssal.parallel import zero
from abyssal.parallel.mesh import Mesh
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.spec.placement import Placement
from abyssal.train.config import BalanceConfig, OptimizerConfig, ParallelConfig, TrainConfig
from abyssal.train.loop import build_model
from abyssal.train.masters import as_saved
from abyssal.train.ranks import expert_share
from abyssal.train.stages import plan_pipeline
from abyssal.train.step import StepResult, Trainer

SPEC = ModelSpec(
    family="deepseek_v3",
    vocab_size=96,
    hidden_size=24,
    num_layers=2,
    dense_ffn_size=40,
    attention=LatentAttentionSpec(
        num_heads=2, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
    ),
    moe=MoESpec(
        num_experts=16, num_shared_experts=1, top_k=4, expert_ffn_size=12, num_groups=4, num_kept_groups=2,
        route_scale=1.5,
    ),
    num_dense_layers=1,
    mtp_depth=1,
    max_positions=64,
    init_std=0.1,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=20,
    seq_len=10,
    batch_size=16,
    compute="float64",
    optimizer=OptimizerConfig(lr=5e-3, warmup_steps=2, clip=0.5),
    balance=BalanceConfig(bias_speed=0.01, sequence_alpha=0.1, expert_alpha=0.05, communication_alpha=0.02),
    validate_every=100,
)
COMPARED_STEPS = (0, 4, 9, 19)
"""Whose gradients are kept; losses are kept of all."""


@dataclass(frozen=True)
class Case:
    """One way to train the same model on the same rows."""

    mesh: str = "dp=2,ep=2"
    ranks_per_node: int | None = None
    dispatch: Any = "alltoall"
    micro_batch_size: int | None = None
    schedule: Any = "dualpipe"
    stage_layers: tuple[int, ...] | None = None
    num_layers: int = 2
    redundant: int = 0
    moves: bool = False
    """Change the placement after every third step."""
    lora: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    """Other fields of the config, of the reference too."""
    masked: bool = False
    """Documents, and targets that are not learned, unevenly over the rows."""
    forced: Mapping[int, Tensor] | None = None
    """Expert ids (T, K) of the global batch, by layer."""

    @property
    def spec(self) -> ModelSpec:
        return dataclasses.replace(SPEC, num_layers=self.num_layers)

    @property
    def world_size(self) -> int:
        return ParallelConfig(mesh=self.mesh).mesh_spec(_size(self.mesh)).world_size


def _size(mesh: str) -> int:
    sizes = dict(part.split("=") for part in mesh.split(","))
    return int(sizes.get("pp", 1)) * int(sizes.get("dp", 1))


@dataclass
class Outcome:
    """What a rank, or the reference, saw."""

    losses: list[tuple[float, ...]] = field(default_factory=list)
    """By step: loss, MTP losses, balance loss, gradient norm."""
    loads: list[dict[int, list[int]]] = field(default_factory=list)
    gradients: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By step and parameter: a tensor, or this rank's shards as (shape, [(offsets, tensor)])."""
    state: dict[str, Any] = field(default_factory=dict)
    """Every tensor of the trainer after the last step, likewise."""
    routings: dict[int, Tensor] = field(default_factory=dict)
    """Expert ids of the first pass, by layer."""


def batch(step: int, masked: bool = False) -> Batch:
    generator = np.random.default_rng((7, step))
    columns = CONFIG.seq_len + 1 + SPEC.mtp_depth
    tokens_BX = generator.integers(0, SPEC.vocab_size, (CONFIG.batch_size, columns))
    if not masked:
        return Batch(tokens_BX)
    cuts = generator.integers(1, columns, CONFIG.batch_size)
    documents = tuple((int(cut), columns - int(cut)) for cut in cuts)
    trained_BX = generator.random(tokens_BX.shape) < generator.random((CONFIG.batch_size, 1))
    return Batch(tokens_BX, trained_BX, documents)


def config_of(case: Case) -> TrainConfig:
    parallel = ParallelConfig(
        mesh=case.mesh, ranks_per_node=case.ranks_per_node, dispatch=case.dispatch, redundant_experts=case.redundant,
        rebalance_every=3 if case.moves else 0, schedule=case.schedule, stage_layers=case.stage_layers,
    )  # fmt: skip
    fields = {"micro_batch_size": case.micro_batch_size, "parallel": parallel, **case.config}
    return dataclasses.replace(CONFIG, **fields)


def reference(case: Case, steps: int = 20) -> Outcome:
    """The same on one rank, the batch in one piece."""
    config = dataclasses.replace(config_of(case), parallel=ParallelConfig(), micro_batch_size=None)
    model = build_model(case.spec, config)
    if case.lora:
        add_lora(model, LORA, torch.Generator().manual_seed(3))
    return run(Trainer(model, config), case, steps)


LORA = LoraConfig(rank=3, alpha=6.0, targets=("attention", "experts", "ffn"))


def on_a_rank(case: Case, steps: int = 20) -> Outcome:
    """To be run by every worker."""
    config = config_of(case)
    spec = config.parallel.mesh_spec(distributed.get_world_size())
    mesh = Mesh(spec)
    try:
        pipeline = plan_pipeline(case.spec, config, spec)
        part = None if pipeline is None else pipeline.part(mesh.place.stage)
        share = expert_share(case.spec, config.parallel, spec, mesh.rank, part)
        model = build_model(case.spec, config, share)
        if case.lora:
            add_lora(model, LORA, torch.Generator().manual_seed(3))
        trainer = Trainer(model, config, mesh, pipeline=pipeline)
        try:
            return run(trainer, case, steps)
        finally:
            trainer.close()
    finally:
        mesh.close()


def in_small_buckets(case: Case, steps: int) -> Outcome:
    """The same with a message for nearly every parameter, as a large model has: each module waits for its own alone."""
    size, zero.BUCKET_ELEMENTS = zero.BUCKET_ELEMENTS, 1
    try:
        return on_a_rank(case, steps)
    finally:
        zero.BUCKET_ELEMENTS = size


def run(trainer: Trainer, case: Case, steps: int) -> Outcome:
    outcome, collect = Outcome(), trainer.masters.gradients
    kept: dict[str, Any] = {}

    def gradients() -> dict[str, Tensor]:
        found = collect()
        copies = {name: gradient.clone() for name, gradient in found.items()}
        kept.update({name: _plain(value) for name, value in as_saved(trainer.masters, copies).items()})
        return found

    trainer.masters.gradients = gradients  # type: ignore[method-assign]
    passes = watch_passes(trainer, case)
    for step in range(steps):
        first, count = trainer.rows(step)
        offset = first - trainer.plan.step(step).first_row
        result = trainer.step(batch(step, case.masked).part(offset, offset + count))
        outcome.losses.append(_figures(result))
        outcome.loads.append({layer: load_E.tolist() for layer, load_E in result.loads.items()})
        if not outcome.routings:
            outcome.routings = {layer: one.expert_ids_TK for layer, one in passes[0].routings.items()}
        if step in COMPARED_STEPS:
            outcome.gradients[step] = dict(kept)
        if case.moves and trainer.mesh is not None and step % 3 == 2:
            trainer.place({layer: moved(one, step) for layer, one in trainer.model.placements().items()})
    tensors = trainer.tensors()
    del tensors["generator/torch"]  # each process has its own, from which nothing is drawn
    outcome.state = {name: _plain(value) for name, value in tensors.items()}
    return outcome


def watch_passes(trainer: Trainer, case: Case) -> list[Step]:
    """The record of every pass to come; their routing is the case's, where it has one."""
    passes: list[Step] = []
    make = trainer.model.step
    share = CONFIG.batch_size * CONFIG.seq_len // trainer.ranks.num_ranks
    begin = 0 if trainer.mesh is None else share * trainer.mesh.place.data
    size = share if case.micro_batch_size is None else case.micro_batch_size * CONFIG.seq_len

    def step(*args: Any, **fields: Any) -> Step:
        if case.forced is not None:
            first = begin + len(passes) * size % share  # micro-batches go forward in their order
            fields["forced_routing"] = {layer: ids[first : first + size] for layer, ids in case.forced.items()}
        made = make(*args, **fields)
        passes.append(made)
        return made

    trainer.model.step = step  # type: ignore[method-assign]
    return passes


def moved(placement: Placement, seed: int) -> Placement:
    """Another placement of as many slots: experts in a random order, random ones several times."""
    generator = np.random.default_rng(seed)
    spare = generator.integers(0, placement.num_experts, placement.num_slots - placement.num_experts)
    slots = generator.permutation([*range(placement.num_experts), *spare.tolist()])
    return Placement(placement.num_experts, tuple(int(slot) for slot in slots), placement.num_ranks)


def _figures(result: StepResult) -> tuple[float, ...]:
    return (result.loss, *result.mtp_losses, result.balance_loss, result.grad_norm)


def _plain(value: Tensor | Sharded) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.shape, [(shard.offsets, shard.tensor.detach().clone()) for shard in value.shards]


def whole(parts: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors that the ranks hold together; every element must be held once."""
    found: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [_as_shards(part[name]) for part in parts]
        shape = values[0][0]
        dtype = next(tensor.dtype for _, shards in values for _, tensor in shards)
        tensor, held = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
        for _, shards in values:
            for offsets, shard in shards:
                where = tuple(slice(o, o + size) for o, size in zip(offsets, shard.shape, strict=True))
                tensor[where] = shard
                held[where] += 1
        assert (held == 1).all(), f"{name}: held {held.min()} to {held.max()} times"
        found[name] = tensor
    return found


def _as_shards(value: Any) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]:
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), [((0,) * value.dim(), value)]


def worst_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor over the largest value of that tensor."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    worst = (0.0, "")
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        largest = float(tensor.abs().max())
        difference = float((found[name].double() - tensor.double()).abs().max())
        worst = max(worst, (difference / largest if largest else difference, name))
    return worst


def rebalanced_on_a_rank(case: Case) -> tuple[list[int], list[tuple[int, ...]], Outcome]:
    """With the trainer's own rebalancing: slots moved by step, each layer's slots in the end."""
    config = config_of(case)
    mesh = Mesh(config.parallel.mesh_spec(case.world_size))
    try:
        share = expert_share(SPEC, config.parallel, mesh.spec, mesh.rank)
        trainer = Trainer(build_model(SPEC, config, share), config, mesh)
        moved: list[int] = []
        take_step = trainer.step

        def step(batch: Batch) -> StepResult:
            result = take_step(batch)
            assert result.ranks is not None
            moved.append(result.ranks.moved)
            return result

        trainer.step = step  # type: ignore[method-assign]
        try:
            outcome = run(trainer, Case(case.mesh, masked=case.masked), 20)
            return moved, [one.slots for one in trainer.model.placements().values()], outcome
        finally:
            trainer.close()
    finally:
        mesh.close()
