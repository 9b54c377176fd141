"""The whole state of a training run goes from mesh to mesh through checkpoints and comes back bit for bit.

Each hop loads on another mesh than the one before and saves again: parameters, both moments, the average, biases and
frozen weights, with experts in other slots, some of them twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from abyssal.checkpoint.rectangles import Rectangle
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.model.lora import add_lora
from abyssal.parallel.mesh import Mesh
from abyssal.train.checkpoints import Checkpoints, newest_checkpoint
from abyssal.train.config import OptimizerConfig, ParallelConfig
from abyssal.train.loop import build_model
from abyssal.train.ranks import expert_share
from abyssal.train.run import restore
from abyssal.train.stages import plan_pipeline
from abyssal.train.step import Trainer
from tests.support.many_ranks import LORA, SPEC, Case, batch, config_of
from tests.support.worker_pool import WorkerPool

ALONE = "alone"
MESHES = (ALONE, "dp=1", "dp=2", "dp=2,ep=2", "dp=4,ep=2", "dp=4,ep=4", "dp=4", "pp=2,dp=1", "pp=2,dp=2,ep=2")
CONFIGS: dict[str, dict[str, Any]] = {
    "FP32, an average": {"compute": "float32", "ema_decay": 0.9},
    "BF16, moments in BF16, an average": {
        "compute": "bfloat16",
        "ema_decay": 0.9,
        "optimizer": OptimizerConfig(lr=5e-3, moments="bfloat16"),
    },
    "FP8": {"compute": "bfloat16", "precision": "fp8"},
    "adapters": {"compute": "bfloat16"},
}

OFTEN: tuple[str, ...] = ()


@contextlib.contextmanager
def opened(mesh_text: str, redundant: int, name: str) -> Iterator[Trainer]:
    """A trainer of the config ``name`` on a mesh, or alone."""
    where = "dp=1" if mesh_text == ALONE else mesh_text
    micro = 2 if "pp=" in mesh_text else None
    case = Case(where, redundant=redundant, config=CONFIGS[name], schedule="zb1p", micro_batch_size=micro)
    config, mesh, share, pipeline = config_of(case), None, None, None
    if mesh_text == ALONE:
        config = dataclasses.replace(config, parallel=ParallelConfig())
    else:
        mesh = Mesh(config.parallel.mesh_spec(distributed.get_world_size()))
        pipeline = plan_pipeline(SPEC, config, mesh.spec)
        part = None if pipeline is None else pipeline.part(mesh.place.stage)
        share = expert_share(SPEC, config.parallel, mesh.spec, mesh.rank, part)
    model = build_model(SPEC, config, share)
    if name == "adapters":
        add_lora(model, LORA, torch.Generator().manual_seed(3))
    trainer = Trainer(model, config, mesh, pipeline=pipeline)
    try:
        yield trainer
    finally:
        trainer.close()
        if mesh is not None:
            mesh.close()


def hop(mesh_text: str, redundant: int, name: str, source: Path | None, target: Path) -> None:
    """Take up the checkpoint in ``source``, or train two steps, and save in ``target``."""
    with opened(mesh_text, redundant, name) as trainer:
        group = None if trainer.mesh is None else trainer.mesh.control
        if source is not None:
            saved = newest_checkpoint(source, group)
            assert saved is not None
            restore(trainer, saved, group)
        while trainer.steps_done < 2:
            first, count = trainer.rows(trainer.steps_done)
            offset = first - trainer.plan.step(trainer.steps_done).first_row
            trainer.step(batch(trainer.steps_done).part(offset, offset + count))
        with Checkpoints(target, group=group) as checkpoints:
            checkpoints.save(2, trainer.tensors(), trainer.fields())


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds, read whole."""
    with ShardedReader(folder / "step-00000002") as reader:
        reader.check_files()
        read = {name: reader.read(name, Rectangle.whole(one.shape)) for name, one in reader.tensors.items()}
        return read, reader.fields


def travel(workers: WorkerPool, folder: Path, name: str, meshes: list[tuple[str, int]]) -> None:
    source, first = None, None
    for number, (mesh_text, redundant) in enumerate(meshes):
        target = folder / str(number)
        if mesh_text == ALONE:
            hop(mesh_text, redundant, name, source, target)
        else:
            size = Case(mesh=mesh_text).world_size
            workers(size, timeout=300)(hop, mesh_text, redundant, name, source, target)
        tensors, fields = contents(target)
        first = first or (tensors, fields)
        assert fields == first[1] and tensors.keys() == first[0].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == first[0][key].dtype, (mesh_text, key)
            assert torch.equal(tensor.view(torch.uint8), first[0][key].view(torch.uint8)), (mesh_text, key)
        source = target
    assert first is not None and any(key.startswith("optimizer/") for key in first[0])


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_there_and_back(name: str, workers: WorkerPool, tmp_path: Path) -> None:
    travel(workers, tmp_path, name, [("dp=4,ep=2", 4), ("dp=2,ep=2", 0), (ALONE, 0), ("dp=4,ep=4", 4)])


@pytest.mark.parametrize(
    "name", [name if name == "FP32, an average" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_into_a_pipeline_and_out_of_it(name: str, workers: WorkerPool, tmp_path: Path) -> None:
    travel(workers, tmp_path, name, [("dp=2,ep=2", 4), ("pp=2,dp=2,ep=2", 4), (ALONE, 0), ("pp=2,dp=1", 0)])
    travel(workers, tmp_path / "back", name, [("pp=2,dp=1", 0), ("dp=2,ep=2", 4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(8))
def test_random_meshes(seed: int, name: str, workers: WorkerPool, tmp_path: Path) -> None:
    draw = random.Random(seed)
    meshes = [(mesh, draw.choice([0, 4]) if "ep=" in mesh else 0) for mesh in draw.choices(MESHES, k=5)]
    travel(workers, tmp_path, name, meshes)
