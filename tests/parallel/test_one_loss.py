"""One loss and one gradient, whatever the mesh."""

from __future__ import annotations

import pytest

from tests.support.many_ranks import COMPARED_STEPS, Case, on_a_rank, reference, whole, worst_difference
from tests.support.worker_pool import WorkerPool

CASES = [
    Case("dp=2,ep=1"),
    Case("dp=2,ep=2"),
    Case("dp=4,ep=2", micro_batch_size=1),
    Case("dp=4,ep=4", redundant=4, moves=True),
    Case("dp=8,ep=4", masked=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_rank(case: Case, workers: WorkerPool) -> None:
    wanted = reference(case)
    found = workers(case.world_size, timeout=120)(on_a_rank, case)
    for outcome in found:
        assert outcome.loads == wanted.loads
        for ours, theirs in zip(outcome.losses, wanted.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
    for step in COMPARED_STEPS:
        gradients = whole([outcome.gradients[step] for outcome in found])
        difference, name = worst_difference(gradients, wanted.gradients[step])
        assert difference < 1e-8, (step, name)
