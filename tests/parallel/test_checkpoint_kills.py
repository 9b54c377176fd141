"""SIGKILL of either of two ranks at any moment of a save: the other notices, and the last checkpoint is whole.

The ranks are children of the test's process, which cost no start of Python.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from abyssal.checkpoint.sharded import load_sharded
from abyssal.train.checkpoints import Checkpoints, saved_checkpoints
from tests.parallel.test_checkpoints import held, whole, world
from tests.support.forked import exit_status, fork

RANKS = 2
KINDS = {0: ("write", "mkdir", "fsync", "rename", "unlink", "rmdir"), 1: ("write", "fsync")}
"""What each rank asks of the system while it saves."""


def kill_at(kind: str, moment: int) -> None:
    """End this process before its ``moment``-th call of ``os.kind`` from now on."""
    calls, call = itertools.count(1), getattr(os, kind)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    setattr(os, kind, counted)


def save_often(folder: Path, rank: int, kind: str | None, moment: int) -> None:
    """Steps 1, 2 and 2 once more, of which one is kept; the rank that is given a ``kind`` is killed after the first."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder.with_suffix(".store")), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=20))
    os.fsync = lambda descriptor: None  # slow, and a kill loses nothing that was written
    with Checkpoints(folder, keep=1, group=world()) as checkpoints:
        for step in (1, 2, 2):
            checkpoints.save(step, held(whole(step), rank, RANKS), {"step": step})
            checkpoints.wait()
            if step == 1 and kind is not None:
                kill_at(kind, moment)
                kind = None


def killed(folder: Path, victim: int, kind: str, moment: int) -> bool:
    """Whether rank ``victim`` was killed; the other ranks must have noticed, or have been done."""
    children = [fork(lambda: _work(folder, rank, victim, kind, moment)) for rank in range(RANKS)]  # noqa: B023
    statuses = [exit_status(child) for child in children]
    is_killed = statuses[victim] == -signal.SIGKILL
    assert is_killed or statuses == [0] * RANKS
    assert all(status in (0, 1) for rank, status in enumerate(statuses) if rank != victim), statuses
    return is_killed


def _work(folder: Path, rank: int, victim: int, kind: str, moment: int) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the traceback of the one that is left, which is as it should be
    save_often(folder, rank, kind if rank == victim else None, moment)


def assert_whole(folder: Path) -> None:
    """The run can go on: nothing half-written is left once it takes its folder again, and what is there loads."""
    Checkpoints(folder).close()
    saved = saved_checkpoints(folder)
    assert saved and sorted(path.name for path in folder.glob("*") if path.name != ".lock") == [
        checkpoint.path.name for checkpoint in saved
    ]
    for checkpoint in saved:
        loaded = {name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}
        assert load_sharded(checkpoint.path, loaded) == {"step": checkpoint.step}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in whole(checkpoint.step).items())


@pytest.mark.parametrize(
    ("victim", "kind", "moment"),
    [(0, "write", 2), (0, "fsync", 3), (0, "rename", 2), (0, "rmdir", 1), (1, "write", 1), (1, "fsync", 1)],
)
def test_a_rank_is_killed_while_it_saves(victim: int, kind: str, moment: int, tmp_path: Path) -> None:
    assert killed(tmp_path / "run", victim, kind, moment)
    assert_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "kind"), [(rank, kind) for rank, kinds in KINDS.items() for kind in kinds])
def test_a_rank_is_killed_at_every_moment_of_a_save(victim: int, kind: str, tmp_path: Path) -> None:
    moment = 1
    while killed(tmp_path / "run", victim, kind, moment):
        assert_whole(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run.store").unlink(missing_ok=True)
        moment += 1
    assert moment > 1, "it is never asked for"
    assert [checkpoint.step for checkpoint in saved_checkpoints(tmp_path / "run")] == [2]
