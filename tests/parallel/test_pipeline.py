"""One loss and one gradient, whatever the schedule: stages on ranks against the whole model on one, in FP64."""

from __future__ import annotations

from functools import cache

import pytest

from abyssal.train.loop import build_model
from tests.support.many_ranks import CONFIG
from tests.support.pipelines import SPEC, Found, assert_same, batch, on_a_rank, together, whole
from tests.support.worker_pool import WorkerPool


@cache
def wanted(num_micro_batches: int, seed: int) -> Found:
    return whole(build_model(SPEC, CONFIG), batch(num_micro_batches, seed), num_micro_batches)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_losses_and_gradients_are_those_of_the_whole_model(name: str, ranks: int, workers: WorkerPool) -> None:
    found = workers(ranks)(on_a_rank, name, 8)
    assert_same(together([one for (one,) in found]), wanted(8, 0))
