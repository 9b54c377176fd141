"""A trainer on several ranks beside one on one: what it keeps where, when it sends, evaluation, faults, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from abyssal.checkpoint.sharded import load_sharded, save_sharded
from abyssal.data.batch import Batch
from abyssal.parallel.bucket import Bucket
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.zero import ShardedMasters
from abyssal.train.config import OptimizerConfig, ParallelConfig, TrainConfig
from abyssal.train.evaluate import evaluate, hidden_states
from abyssal.train.fault import TrainingFault
from abyssal.train.loop import build_model
from abyssal.train.ranks import expert_share
from abyssal.train.stages import plan_pipeline
from abyssal.train.step import Trainer
from tests.support.many_ranks import CONFIG, SPEC, batch, worst_difference
from tests.support.worker_pool import WorkerFailure, WorkerPool

TOKEN_BYTES = np.arange(SPEC.vocab_size) % 5 + 1


def config_of(mesh: str | None, **fields: Any) -> TrainConfig:
    names = "redundant_experts", "rebalance_every", "schedule"
    parallel = {name: fields.pop(name) for name in names if name in fields}
    return dataclasses.replace(CONFIG, parallel=ParallelConfig(mesh=mesh, **parallel), **fields)


class OnRank:
    """A trainer on this rank of a mesh, and its end."""

    def __init__(self, config: TrainConfig) -> None:
        self.mesh = Mesh(config.parallel.mesh_spec(distributed.get_world_size()))
        pipeline = plan_pipeline(SPEC, config, self.mesh.spec)
        part = None if pipeline is None else pipeline.part(self.mesh.place.stage)
        share = expert_share(SPEC, config.parallel, self.mesh.spec, self.mesh.rank, part)
        self.trainer = Trainer(build_model(SPEC, config, share), config, self.mesh, pipeline=pipeline)

    def __enter__(self) -> Trainer:
        return self.trainer

    def __exit__(self, *_: object) -> None:
        self.trainer.close()
        self.mesh.close()


def own_rows(trainer: Trainer, step: int) -> Batch:
    first, count = trainer.rows(step)
    begin = first - trainer.plan.step(step).first_row
    return batch(step).part(begin, begin + count)


# ---- what is kept where ----


def _dtypes_and_sizes(compute: Any, precision: Any) -> dict[str, Any]:
    with OnRank(config_of("dp=4,ep=2", compute=compute, precision=precision)) as trainer:
        trainer.step(own_rows(trainer, 0))
        trainer.masters.wait()
        model, masters = trainer.model, trainer.masters.tensors
        assert all(parameter.grad is None for parameter in model.parameters()), "gradients are given back"
        embed = model.embed.weight
        mine = next(owned for owned in trainer.masters.owned(masters) if owned.parameter == "embed.weight")  # type: ignore[union-attr]
        rows = slice(mine.offsets[0], mine.offsets[0] + len(mine.tensor))
        assert torch.equal(embed[rows], mine.tensor.to(embed.dtype)), "the model has the masters' new values, cast"
        return {
            "dtypes": {name: str(parameter.dtype) for name, parameter in model.named_parameters()},
            "masters": {str(tensor.dtype) for tensor in masters.values()},
            "owned": sum(tensor.numel() for tensor in masters.values()),
            "moments": sum(tensor.numel() for tensor in trainer.optimizer.means.values()),
        }


@pytest.mark.parametrize("precision", ["compute", "fp8"])
def test_parameters_are_as_their_products_read_them_and_masters_in_parts(precision: str, workers: WorkerPool) -> None:
    found = workers(4)(_dtypes_and_sizes, "bfloat16", precision)
    wide = {name for name, dtype in found[0]["dtypes"].items() if dtype == "torch.float32"}
    narrow = found[0]["dtypes"].keys() - wide
    assert all("norm" in name or "router" in name for name in wide) if precision == "compute" else narrow
    if precision == "fp8":
        assert {"embed.weight", "head.weight", "mtp.0.projection.weight"} == narrow, "what is quantised stays FP32"
    assert all(one["masters"] == {"torch.float32"} for one in found)
    whole = sum(parameter.numel() for parameter in build_model(SPEC, config_of(None)).parameters())
    assert sum(one["owned"] for one in found) == sum(one["moments"] for one in found) == whole
    assert max(one["owned"] for one in found) < 1.15 * whole / 4


def _order_of_sending() -> tuple[list[str], list[str]]:
    """What is sent in a step's backward, and what of the new values has come when the next forward begins."""
    events: list[str] = []
    reduce, finish = Bucket.start_reduce, Bucket.finish_gather
    with OnRank(config_of("dp=2,ep=2", compute="float32", micro_batch_size=4)) as trainer:
        assert isinstance(trainer.masters, ShardedMasters)
        parts = trainer.masters._parts
        names = {part.bucket: next(iter(part.parameters)) for part in parts}
        first = trainer.model.layers[0].register_full_backward_pre_hook(lambda *_: events.append("backward of layer 0"))
        enter = trainer.model.embed.register_forward_hook(lambda *_: events.append("forward"))

        def start(bucket: Bucket, gradients: Any) -> None:
            events.append(f"gradients of {names[bucket]}")
            reduce(bucket, gradients)

        def arrive(bucket: Bucket, targets: Any) -> None:
            events.append(f"values of {names[bucket]}")
            finish(bucket, targets)

        Bucket.start_reduce, Bucket.finish_gather = start, arrive  # type: ignore[method-assign]
        try:
            for step in range(2):
                trainer.step(own_rows(trainer, step))
        finally:
            Bucket.start_reduce, Bucket.finish_gather = reduce, finish  # type: ignore[method-assign]
            first.remove()
            enter.remove()
    return events, [names[part.bucket] for part in parts]


def test_gradients_set_out_in_the_backward_and_values_come_when_they_are_needed(
    workers: WorkerPool,
) -> None:
    found = workers(2)(_order_of_sending_in_small_buckets)
    assert found[0] == found[1], "all ranks send in one order"
    events, names = found[0]
    last_backward = len(events) - 1 - events[::-1].index("backward of layer 0")
    sent = [event for event in events if event.startswith("gradients")]
    assert len(sent) == 2 * len(names), "once a step, whatever the number of micro-batches"
    before = [event for event in events[:last_backward] if event.startswith("gradients")]
    assert len(before) > len(names), "those of the last layers before the first layer's backward"
    forwards = [index for index, event in enumerate(events) if event == "forward"]
    second_step = events[forwards[len(forwards) // 2] :]
    late = [event for event in second_step if event.startswith(("values of mtp", "values of layers.1"))]
    assert late, "a block's values are waited for when its forward comes, not before"


def _order_of_sending_in_small_buckets() -> tuple[list[str], list[str]]:
    from abyssal.parallel import zero

    size, zero.BUCKET_ELEMENTS = zero.BUCKET_ELEMENTS, 1000
    try:
        return _order_of_sending()
    finally:
        zero.BUCKET_ELEMENTS = size


# ---- evaluation and faults ----


def _held_out(rows: list[int]) -> list[Batch]:
    return [batch(100 + number).part(0, count) for number, count in enumerate(rows)]


def _evaluated(rows: list[int], mesh: str) -> Any:
    fields: dict[str, Any] = {"schedule": "1f1b", "micro_batch_size": 4} if "pp=" in mesh else {}
    with OnRank(config_of(mesh, **fields)) as trainer:
        forward = hidden_states if trainer.pipeline is None else trainer.pipeline.hidden
        return evaluate(trainer.model, _held_out(rows), TOKEN_BYTES, trainer.dispatcher, trainer.ranks, forward)


@pytest.mark.parametrize("mesh", ["dp=4,ep=4", "pp=2,dp=2,ep=2"])
@pytest.mark.parametrize("rows", [[16, 16], [8, 5], [1], [3, 2, 7]])
def test_held_out_rows_count_once_however_they_divide(rows: list[int], mesh: str, workers: WorkerPool) -> None:
    wanted = evaluate(build_model(SPEC, config_of(None)), _held_out(rows), TOKEN_BYTES)
    for found in workers(4)(_evaluated, rows, mesh):
        assert {layer: load_E.tolist() for layer, load_E in found.loads.items()} == {
            layer: load_E.tolist() for layer, load_E in wanted.loads.items()
        }
        for field in dataclasses.fields(wanted):
            if field.name != "loads":
                assert getattr(found, field.name) == pytest.approx(getattr(wanted, field.name), rel=1e-12), field.name


def _with_a_broken_gradient(rank: int) -> None:
    with OnRank(config_of("dp=2,ep=2")) as trainer:
        if trainer.mesh is not None and trainer.mesh.rank == rank:
            name = "layers.1.ffn.experts.w_down_EDF"
            trainer.model.get_parameter(name).register_hook(lambda gradient: gradient * float("nan"))
        before = {name: tensor.detach().clone() for name, tensor in trainer.masters.tensors.items()}
        with pytest.raises(TrainingFault) as caught:
            trainer.step(own_rows(trainer, 0))
        assert f"on rank {rank} the gradient of layers.1.ffn.experts.w_down_EDF" in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.masters.tensors.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_is_every_ranks(rank: int, workers: WorkerPool) -> None:
    workers(2)(_with_a_broken_gradient, rank)


def _with_a_broken_gradient_in_a_stage(rank: int) -> None:
    with OnRank(config_of("pp=2,dp=1", schedule="zb1p", micro_batch_size=4)) as trainer:
        name = f"layers.{rank}.attention.out.weight"
        assert trainer.pipeline is not None and trainer.mesh is not None
        run = trainer.pipeline.run

        def broken(given: Any) -> Any:
            sums = run(given)
            if trainer.mesh is not None and trainer.mesh.rank == rank:
                trainer.model.get_parameter(name).grad[0, 0] = float("nan")  # type: ignore[index]
            return sums

        trainer.pipeline.run = broken  # type: ignore[method-assign]
        before = {name: tensor.detach().clone() for name, tensor in trainer.masters.tensors.items()}
        with pytest.raises(TrainingFault, match=f"on rank {rank} the gradient of {name}"):
            trainer.step(own_rows(trainer, 0))
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.masters.tensors.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_stage_is_every_stages(rank: int, workers: WorkerPool) -> None:
    workers(2)(_with_a_broken_gradient_in_a_stage, rank)


def _of_the_wrong_size() -> None:
    with OnRank(config_of("dp=4,ep=4")):
        pass


def test_a_mesh_of_another_number_of_ranks_is_refused(workers: WorkerPool) -> None:
    with pytest.raises(WorkerFailure, match="mesh dp=4,ep=4 is of 4 ranks and there are 2; give a mesh whose pp x dp"):
        workers(2)(_of_the_wrong_size)


# ---- checkpoints on any mesh ----

OPTIMIZER = OptimizerConfig(lr=5e-3, warmup_steps=2)


def _save(folder: Path, mesh: str, steps: int, fields: dict[str, Any]) -> None:
    with OnRank(config_of(mesh, **fields)) as trainer:
        for step in range(steps):
            trainer.step(own_rows(trainer, step))
        assert trainer.mesh is not None
        save_sharded(folder, trainer.tensors(), trainer.fields(), trainer.mesh.control)


def _load_and_go_on(folder: Path, mesh: str, steps: int, fields: dict[str, Any]) -> list[float]:
    with OnRank(config_of(mesh, **fields)) as trainer:
        assert trainer.mesh is not None
        tensors = trainer.tensors(saving=False)
        loaded = load_sharded(folder, tensors, group=trainer.mesh.control)
        trainer.restore(loaded, tensors["generator/torch"])  # type: ignore[arg-type]
        copy = folder.with_name(f"{folder.name}-again")
        save_sharded(copy, trainer.tensors(), trainer.fields(), trainer.mesh.control)
        return [trainer.step(own_rows(trainer, trainer.steps_done)).loss for _ in range(steps)]


def _whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """A single rank's reading of a checkpoint."""
    config = config_of(None, ema_decay=0.9)
    tensors = Trainer(build_model(SPEC, config), config).tensors()
    for tensor in tensors.values():
        assert isinstance(tensor, torch.Tensor)
        tensor.zero_()
    load_sharded(folder, tensors)
    return tensors  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("dp=4,ep=4", {"redundant_experts": 4, "rebalance_every": 2}), ("dp=2,ep=2", {})),
        (("dp=2,ep=1", {}), ("dp=4,ep=2", {"redundant_experts": 2, "rebalance_every": 3})),
    ],
)
def test_a_run_goes_on_on_another_mesh(before: Any, after: Any, tmp_path: Path, workers: WorkerPool) -> None:
    folder = tmp_path / "saved"
    workers(int(before[0][3]), timeout=120)(_save, folder, before[0], 4, {"ema_decay": 0.9, **before[1]})
    found = workers(int(after[0][3]), timeout=120)(_load_and_go_on, folder, after[0], 3, {"ema_decay": 0.9, **after[1]})
    saved, again = _whole_state(folder), _whole_state(tmp_path / "saved-again")
    assert all(torch.equal(saved[name], again[name]) for name in saved), "bit for bit after save, load and save"
    config = config_of(None, ema_decay=0.9)
    alone = Trainer(build_model(SPEC, config), config)
    losses = [alone.step(batch(step)).loss for step in range(4)]
    difference, name = worst_difference(
        {name: tensor for name, tensor in saved.items() if "generator" not in name},
        {name: tensor for name, tensor in alone.tensors().items() if "generator" not in name},  # type: ignore[misc]
    )
    assert difference < 1e-7, name
    losses = [alone.step(batch(step)).loss for step in range(4, 7)]
    for one in found:
        assert one == pytest.approx(losses, rel=1e-9)
