"""What some ranks save together, any others load, bit for bit; and what fails on one of them fails on all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed

from abyssal.checkpoint.sharded import load_sharded, save_sharded
from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.train.checkpoints import Checkpoints, newest_checkpoint

ROWS = "model/layers.0.attention.q.weight"
EXPERTS = "optimizer/layers.1.ffn.experts.w_down_EDF/mean"
REPLICATED = "model/norm.weight"
SHAPES = {ROWS: (13, 5), EXPERTS: (4, 6, 3), REPLICATED: (7,)}


def world() -> distributed.ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


def whole(step: int) -> dict[str, Tensor]:
    """The tensors of a step, all of them."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def rows_of(count: int, rank: int, size: int) -> slice:
    """The rank-th of ``size`` runs of ``count`` rows, as equal as can be."""
    return slice(count * rank // size, count * (rank + 1) // size)


def held(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor | Sharded]:
    """What a rank has: rows, experts of which every second rank has half the rows, and on rank 0 the norm."""
    mine = rows_of(SHAPES[ROWS][0], rank, size)
    parts: dict[str, Tensor | Sharded] = {
        ROWS: Sharded(SHAPES[ROWS], torch.float32, (Shard((mine.start, 0), tensors[ROWS][mine]),))
    }
    replicas = 2 if size > 1 else 1
    home, replica = divmod(rank, replicas)
    experts, rows = rows_of(4, home, size // replicas), rows_of(6, replica, replicas)
    shards = [Shard((e, rows.start, 0), tensors[EXPERTS][e : e + 1, rows]) for e in range(4)[experts]]
    parts[EXPERTS] = Sharded(SHAPES[EXPERTS], torch.float32, tuple(shards))
    if rank == 0:
        parts[REPLICATED] = tensors[REPLICATED]
    return parts


def save(folder: Path, step: int) -> None:
    group = world()
    save_sharded(folder, held(whole(step), group.rank(), group.size()), {"step": step}, group)


def load(folder: Path, step: int) -> bool:
    """Whether every rank finds its own rectangles and the replicated tensor."""
    group, expected = world(), whole(step)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    wanted = {**held(loaded, group.rank(), group.size()), REPLICATED: loaded[REPLICATED]}
    fields = load_sharded(folder, wanted, group=group)
    right = held(expected, group.rank(), group.size())
    same = [
        torch.equal(one.tensor, other.tensor)
        for name, tensor in right.items()
        if isinstance(tensor, Sharded)
        for one, other in zip(tensor.shards, wanted[name].shards, strict=True)  # pyright: ignore
    ]
    return all(same) and fields == {"step": step} and torch.equal(loaded[REPLICATED], expected[REPLICATED])


def test_from_two_ranks_to_four_to_one_to_two(workers, tmp_path):
    for step, (savers, loaders) in enumerate([(2, 4), (4, 1), (1, 2)]):
        folder = tmp_path / f"{step}"
        workers(savers)(save, folder, step)
        assert sorted(path.name for path in folder.glob("*.distcp")) == [f"__{rank}_0.distcp" for rank in range(savers)]
        assert workers(loaders)(load, folder, step) == [True] * loaders
        alone = {name: torch.zeros_like(tensor) for name, tensor in whole(step).items()}
        assert load_sharded(folder, alone) == {"step": step}
        assert all(torch.equal(alone[name], tensor) for name, tensor in whole(step).items())


def save_two(folder: Path) -> list[int]:
    group = world()
    with Checkpoints(folder, keep=1, group=group) as checkpoints:
        for step in (1, 2):
            state = whole(step)
            checkpoints.save(step, held(state, group.rank(), group.size()), {"step": step})
            for tensor in state.values():
                tensor.fill_(-1)
        checkpoints.wait()
        newest = newest_checkpoint(folder, group)
        assert newest is not None
        return [newest.step, *(checkpoint.step for checkpoint in [checkpoints.latest()] if checkpoint)]


def test_ranks_save_in_the_background_what_they_hold_at_the_call(workers, tmp_path):
    assert workers(2)(save_two, tmp_path) == [[2, 2]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000002"]
    assert workers(1)(load, tmp_path / "step-00000002", 2) == [True]
