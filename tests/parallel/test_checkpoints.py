"""What some ranks save together, any others load, bit for bit; and what fails on one of them fails on all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


# ---- what fails on one rank ----


def refused(save: Callable[[], object]) -> str:
    """The error that a rank gets."""
    try:
        save()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def save_without_an_expert(folder: Path) -> str:
    group = world()
    parts = held(whole(2), group.rank(), group.size())
    stack = parts[EXPERTS]
    if group.rank() == 1:
        assert isinstance(stack, Sharded)
        parts[EXPERTS] = Sharded(stack.shape, stack.dtype, stack.shards[:2] + stack.shards[3:])
    return refused(lambda: save_sharded(folder, parts, {"step": 2}, group))


def save_on_a_full_disk(folder: Path, full: int) -> list[str]:
    """Errors of a save during which rank ``full`` cannot write, and of the save after it."""
    group = world()
    write = os.write

    def no_room(descriptor: int, data: Any) -> int:
        if os.lseek(descriptor, 0, os.SEEK_CUR) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    errors = []
    with Checkpoints(folder, group=group) as checkpoints:
        for step in (1, 2, 3):
            os.write = no_room if step == 2 and group.rank() == full else write
            state = held(whole(step), group.rank(), group.size())
            errors.append(refused(lambda: checkpoints.save(step, state, {"step": step})))  # noqa: B023
            errors.append(refused(checkpoints.wait))
    os.write = write
    return errors


def load_refused(folder: Path, names: list[str]) -> str:
    group = world()
    wanted = {name: torch.zeros(SHAPES.get(name, (2,))) for name in names}
    error = refused(lambda: load_sharded(folder, wanted, group=group))
    assert not any(tensor.any() for tensor in wanted.values())
    return error


def save_fields(folder: Path, step: float) -> str:
    group = world()
    fields = {"step": step if group.rank() == 1 else 1.0}
    return refused(lambda: save_sharded(folder, held(whole(1), group.rank(), group.size()), fields, group))


def open_two(folder: Path) -> str:
    group = world()
    with Checkpoints(folder, group=group):
        return refused(lambda: Checkpoints(folder, group=group))


def test_an_expert_that_no_rank_holds_is_not_saved_without(workers, tmp_path):
    workers(2)(save, tmp_path / "a", 1)
    for error in workers(2)(save_without_an_expert, tmp_path / "a"):
        assert (
            f"do not hold every tensor whole and once: no rank holds expert 2 of {EXPERTS} ([2:3, 3:6, 0:3])" in error
        )
    assert workers(2)(load, tmp_path / "a", 1) == [True, True], "the older one is as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_is_told_to_all_and_costs_no_other_checkpoint(full, workers, tmp_path):
    for errors in workers(2)(save_on_a_full_disk, tmp_path, full):
        assert [error == "none" for error in errors] == [True, True, True, False, True, True]
        assert f"not saved (rank {full}: No space left on device)" in errors[3] and "is step-00000001" in errors[3]
    assert sorted(path.name for path in tmp_path.glob("*")) == [".lock", "step-00000001", "step-00000003"]
    assert workers(2)(load, tmp_path / "step-00000003", 3) == [True, True]


def test_a_field_that_json_cannot_keep_on_one_rank(workers, tmp_path):
    for error in workers(2)(save_fields, tmp_path / "a", float("nan")):
        assert error.startswith("RankValueError: rank 1: field 'step' of a checkpoint is no JSON value")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "__3_0.distcp", ".metadata"])
def test_damage_is_found_by_whichever_rank_reads_the_file(name, workers, tmp_path):
    workers(4)(save, tmp_path / "a", 1)
    file, data = tmp_path / "a" / name, (tmp_path / "a" / name).read_bytes()
    file.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    for ranks in (4, 2):
        for error in workers(ranks)(load_refused, tmp_path / "a", list(SHAPES)):
            assert f"{name}: was altered after it was written" in error


def test_another_model_is_named_on_all_ranks(workers, tmp_path):
    workers(2)(save, tmp_path / "a", 1)
    for error in workers(2)(load_refused, tmp_path / "a", [ROWS, EXPERTS, "model/new"]):
        assert "model/new is missing" in error and f"{REPLICATED} is unexpected" in error and ROWS not in error
    for error in workers(2)(load_refused, tmp_path / "nothing", [ROWS]):
        assert "nothing: is no checkpoint" in error


def test_one_run_in_a_folder(workers, tmp_path):
    for error in workers(2)(open_two, tmp_path):
        assert "another process is training there" in error


def test_what_one_process_saved_is_loaded_by_ranks(workers, tmp_path):
    save_sharded(tmp_path / "a", whole(5), {"step": 5})
    assert workers(2)(load, tmp_path / "a", 5) == [True, True]
