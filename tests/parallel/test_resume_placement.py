"""A run that places its experts goes on as if it had not stopped: where they were, by the loads since they were placed.

Stopped between two placements, it must know both.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from abyssal.checkpoint.sharded import load_sharded, save_sharded
from abyssal.parallel.mesh import Mesh
from abyssal.train.config import ParallelConfig
from abyssal.train.loop import build_model
from abyssal.train.ranks import expert_share
from abyssal.train.step import Trainer
from tests.support.many_ranks import CONFIG, SPEC, batch
from tests.support.worker_pool import WorkerPool

NUM_EXPERTS = 16
PARALLEL = ParallelConfig(mesh="dp=2,ep=2", redundant_experts=4, rebalance_every=3)


def _trained(folder: Path, stopped: bool) -> dict[str, Any]:
    """Four steps, and two more that end with a placement: in one go, or by another trainer that reads ``folder``."""
    config = dataclasses.replace(CONFIG, parallel=PARALLEL)
    mesh = Mesh(PARALLEL.mesh_spec(distributed.get_world_size()))
    trainer = Trainer(build_model(SPEC, config, expert_share(SPEC, PARALLEL, mesh.spec, mesh.rank)), config, mesh)
    try:
        if stopped:
            tensors = trainer.tensors(saving=False)
            fields = load_sharded(folder, tensors, group=mesh.control)
            generator = tensors["generator/torch"]
            assert isinstance(generator, torch.Tensor)
            trainer.restore(fields, generator)
        else:
            _lean(trainer, 15)
            _train(trainer, 4)
            _lean(trainer, 5)
            save_sharded(folder, trainer.tensors(), trainer.fields(), mesh.control)
        four, steps = _slots(trainer), _train(trainer, 2)
        return {"four": four, "six": _slots(trainer), "steps": steps}
    finally:
        trainer.close()
        mesh.close()


def _lean(trainer: Trainer, hot: int) -> None:
    """Let loads be such that expert ``hot`` must be on both ranks: those of so few steps are too even."""
    assert trainer.rebalancer is not None
    counts = [10_000_000 if expert == hot else 1 for expert in range(NUM_EXPERTS)]
    trainer.rebalancer.add(dict.fromkeys(trainer.model.placements(), counts))


def _train(trainer: Trainer, steps: int) -> list[tuple[int, float, float]]:
    """Slots moved, loss and gradient norm of each step."""
    found = []
    for step in range(trainer.steps_done, trainer.steps_done + steps):
        first, count = trainer.rows(step)
        begin = first - trainer.plan.step(step).first_row
        result = trainer.step(batch(step).part(begin, begin + count))
        assert result.ranks is not None
        found.append((result.ranks.moved, result.loss, result.grad_norm))
    return found


def _slots(trainer: Trainer) -> list[tuple[int, ...]]:
    return [placement.slots for placement in trainer.model.placements().values()]


def test_placements_and_loads_are_gone_on_with(tmp_path: Path, workers: WorkerPool) -> None:
    whole = workers(2, timeout=120)(_trained, tmp_path / "saved", False)
    again = workers(2, timeout=120)(_trained, tmp_path / "saved", True)
    assert whole == again, "bit for bit"
    for when, hot in (("four", 15), ("six", 5)):
        assert all(slots.count(hot) > 1 for slots in whole[0][when]), "by the loads before"
