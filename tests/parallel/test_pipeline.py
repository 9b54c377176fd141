"""One loss and one gradient, whatever the schedule: stages on ranks against the whole model on one, in FP64."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from torch import Tensor, distributed

from abyssal.parallel.pipeline.executor import Executor, Pair, one_after_the_other
from abyssal.parallel.pipeline.pair import OverlappedPair
from abyssal.parallel.pipeline.schedule import schedule
from abyssal.train.loop import build_model
from tests.support.many_ranks import CONFIG
from tests.support.pipelines import (
    SPEC,
    Found,
    OnMesh,
    assert_same,
    batch,
    on_a_mesh,
    on_a_rank,
    together,
    together_on_mesh,
    whole,
)
from tests.support.sleeping_stages import SleepingChunk, boundary
from tests.support.worker_pool import WorkerFailure, WorkerPool


@cache
def wanted(num_micro_batches: int, seed: int = 0) -> Found:
    return whole(build_model(SPEC, CONFIG), batch(num_micro_batches, seed), num_micro_batches)


def check(name: str, ranks: int, workers: WorkerPool, pair: Pair = one_after_the_other, steps: int = 1) -> None:
    number = max(4, 2 * ranks)
    found = workers(ranks, timeout=120)(on_a_rank, name, number, pair, CONFIG, steps)
    for step in range(steps):
        assert_same(together([one[step] for one in found]), wanted(number, step))


@pytest.mark.parametrize(("name", "ranks"), [("gpipe", 2), ("zb1p", 2), ("1f1b", 4), ("dualpipe", 4), ("dualpipev", 2)])
def test_losses_and_gradients_are_those_of_the_whole_model(name: str, ranks: int, workers: WorkerPool) -> None:
    check(name, ranks, workers)


def test_so_they_are_overlapped_and_in_the_next_step(workers: WorkerPool) -> None:
    check("dualpipe", 2, workers, OverlappedPair(), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [one_after_the_other, OverlappedPair()], ids=["one after the other", "overlapped"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_so_they_are_with_every_schedule(name: str, ranks: int, pair: Pair, workers: WorkerPool) -> None:
    if name == "dualpipe" and ranks == 1:
        pytest.skip("DualPipe needs an even number of ranks")
    check(name, ranks, workers, pair)


@cache
def on_mesh(case: OnMesh, workers: WorkerPool) -> list[Found]:
    found = workers(4, timeout=120)(on_a_mesh, case)
    for _, times, _ in found:
        assert times.communicating > 0 and 0 <= times.hidden <= times.communicating
        assert 0 < times.waiting < times.seconds
    return [together_on_mesh(found), *(part for part, *_ in found)]


def test_experts_on_two_ranks_of_each_stage(workers: WorkerPool) -> None:
    """Tokens travel between ranks while the pair computes, and the numbers do not know."""
    case = OnMesh()
    assert_same(on_mesh(case, workers)[0], wanted(2 * case.num_micro_batches))


def test_there_too_a_pair_has_the_bits_of_one_after_the_other(workers: WorkerPool) -> None:
    overlapped, serial = on_mesh(OnMesh(), workers), on_mesh(OnMesh(overlapped=False), workers)
    for ours, theirs in zip(overlapped, serial, strict=True):
        assert (ours.losses, ours.balance) == (theirs.losses, theirs.balance)
        assert ours.gradients.keys() == theirs.gradients.keys()
        assert all(torch.equal(ours.gradients[name], one) for name, one in theirs.gradients.items())


class Dies(SleepingChunk):
    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        if micro_batch == 3:
            os._exit(9)
        return super().forward(micro_batch, x_TD)


def with_one_that_dies() -> None:
    rank = distributed.get_rank()
    chunk = (Dies if rank == 1 else SleepingChunk)(rank, 2)
    Executor(schedule("1f1b", 2, 8), rank, [chunk], distributed.group.WORLD).run(boundary(8))


def test_a_peer_that_dies_in_mid_schedule_is_named_at_once(workers: WorkerPool) -> None:
    with pytest.raises(WorkerFailure) as failure:
        workers(2)(with_one_that_dies)
    assert "the process ended with exit code 9" in str(failure.value)
    expected = "rank 0 of the pipeline: the input's gradient of stage 1 for micro-batch 3 did not come from rank 1"
    assert expected in str(failure.value) or "micro-batch 2 did not come from rank 1" in str(failure.value)
