"""Uneven all-to-all over gloo: what comes is what was sent, and receives are posted before anything is sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from abyssal.parallel import all_to_all
from tests.support.worker_pool import WorkerPool


class Recorded:
    """A group whose point-to-point calls are noted."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self._group = group
        self.calls: list[str] = []

    def rank(self) -> int:
        return self._group.rank()

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> distributed.Work:
        self.calls.append("recv")
        return self._group.recv(tensors, peer, tag)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> distributed.Work:
        self.calls.append("send")
        return self._group.send(tensors, peer, tag)


def _rows(source: int, to: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows and their weights, told apart from any others."""
    numbers = torch.arange(count) + 100 * source + 1000 * to
    return numbers[:, None] + torch.arange(3) / 4, numbers


def _exchanged(seed: int) -> list[str]:
    group = distributed.group.WORLD
    assert group is not None
    rank, size = distributed.get_rank(), distributed.get_world_size()
    recorded = Recorded(group)
    counts = np.random.default_rng(seed).integers(0, 4, (3, size, size))
    counts[:, 0, size - 1] = 0  # one that sends the other nothing
    started = []
    for counts_RR in counts:  # several under way at once keep their order
        sent, received = counts_RR[rank].tolist(), counts_RR[:, rank].tolist()
        rows, weights = map(torch.cat, zip(*(_rows(rank, to, sent[to]) for to in range(size)), strict=True))
        targets = torch.zeros(sum(received), 3), torch.zeros(sum(received), dtype=torch.int64)
        pieces = list(zip(targets, (rows, weights), strict=True))
        started.append((targets, received, all_to_all.start(pieces, received, sent, recorded)))
    for targets, received, work in started:
        work.wait()
        wanted = zip(*(_rows(source, rank, received[source]) for source in range(size)), strict=True)
        for target, parts in zip(targets, wanted, strict=True):
            assert torch.equal(target, torch.cat(parts))
    return recorded.calls


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_comes_is_what_was_sent(ranks: int, seed: int, workers: WorkerPool) -> None:
    calls = [call for one in workers(ranks)(_exchanged, seed) for call in one]
    assert calls.count("send") == calls.count("recv") > 0


def _order() -> list[str]:
    group = distributed.group.WORLD
    assert group is not None
    recorded = Recorded(group)
    ones, pieces = [1] * 4, [(torch.zeros(4, 2), torch.ones(4, 2)), (torch.zeros(4), torch.ones(4))]
    all_to_all.start(pieces, ones, ones, recorded).wait()
    return recorded.calls


def test_receives_are_posted_before_anything_is_sent(workers: WorkerPool) -> None:
    """Else a rank that comes later makes the two directions wait for each other."""
    assert workers(4)(_order) == [["recv"] * 6 + ["send"] * 6] * 4
