"""One loss and one gradient under every pipeline schedule, as in ``test_one_loss``: in FP64 against one rank."""

from __future__ import annotations

import pytest

from tests.parallel.test_one_loss import BOUNDS, check, check_one_step, named
from tests.support.covering import Row, all_rows, pairwise_rows
from tests.support.many_ranks import Case
from tests.support.worker_pool import WorkerPool

OPTIONS = {
    "schedule": ("1f1b", "zb1p", "dualpipe"),
    "mesh": ("pp=2,dp=1", "pp=2,dp=2,ep=2"),
    "replicas": ("none", "moving"),
    "dispatch": ("alltoall", "hierarchical"),
    "masked": (False, True),
}
"""Two layers are two stages; those of more are below."""


def is_possible(row: Row) -> bool:
    """Experts that are all on one rank are not sent and have no replicas."""
    return row["mesh"] != "pp=2,dp=1" or (row["replicas"], row["dispatch"]) == ("none", "alltoall")


def case_of(row: Row) -> Case:
    fields = {name: row[name] for name in ("schedule", "mesh", "dispatch", "masked")}
    redundant, nodes = (2, True) if row["replicas"] == "moving" else (0, False)
    per_node = 1 if row["dispatch"] == "hierarchical" else None
    return Case(**fields, redundant=redundant, moves=nodes, ranks_per_node=per_node, micro_batch_size=2)


FEATURES = {
    "two stages a rank": Case("pp=2,dp=1", micro_batch_size=4, schedule="dualpipev", num_layers=4),
    "four ranks": Case("pp=4,dp=1", micro_batch_size=2, num_layers=5, stage_layers=(2, 1, 1, 1)),
    "adapters": Case("pp=2,dp=2,ep=2", micro_batch_size=2, lora=True, redundant=2, moves=True),
    "an average and recomputation": Case(
        "pp=2,dp=1",
        micro_batch_size=4,
        config={"ema_decay": 0.9, "recompute": ("norm", "up_projection", "swiglu")},
    ),
}


FEW = 5
"""Steps, but for the slow tests' twenty: what a pipeline gets wrong it gets wrong at once."""


@pytest.mark.parametrize("row", pairwise_rows(OPTIONS, is_possible), ids=named)
def test_losses_and_gradients_are_those_of_one_rank(row: Row, workers: WorkerPool) -> None:
    check(case_of(row), workers, steps=FEW)


@pytest.mark.parametrize("name", FEATURES)
def test_so_they_are_with(name: str, workers: WorkerPool) -> None:
    check(FEATURES[name], workers, name if FEATURES[name].config else "", FEW)


@pytest.mark.slow
def test_so_they_are_on_eight_ranks(workers: WorkerPool) -> None:
    check(Case("pp=4,dp=2,ep=2", micro_batch_size=1, num_layers=4, masked=True), workers, steps=FEW)


@pytest.mark.parametrize("precision", BOUNDS)
def test_one_step_in_lower_precision(precision: str, workers: WorkerPool) -> None:
    """Within the bounds of ranks without a pipeline."""
    check_one_step(Case("pp=2,dp=2,ep=2", redundant=2, schedule="zb1p", micro_batch_size=4), precision, workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", all_rows({**OPTIONS, "schedule": ("gpipe", *OPTIONS["schedule"])}, is_possible), ids=named
)
def test_losses_and_gradients_in_every_combination(row: Row, workers: WorkerPool) -> None:
    check(case_of(row), workers)
