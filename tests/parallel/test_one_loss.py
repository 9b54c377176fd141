"""One loss and one gradient, whatever the mesh: every case against the same training on one rank, in FP64."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from abyssal.train.config import BalanceConfig, ParallelConfig
from tests.support.covering import Row, all_rows, pairwise_rows
from tests.support.many_ranks import (
    SPEC,
    Case,
    Outcome,
    in_small_buckets,
    on_a_rank,
    rebalanced_on_a_rank,
    reference,
    whole,
    worst_difference,
)
from tests.support.worker_pool import WorkerPool

OPTIONS = {
    "mesh": ("dp=2,ep=2", "dp=4,ep=2", "dp=4,ep=4"),
    "replicas": ("none", "moving"),
    "dispatch": ("alltoall", "hierarchical"),
    "ranks_per_node": (2, 1),
    "micro_batch_size": (None, 1),
    "masked": (False, True),
}


def case_of(row: Row) -> Case:
    fields: dict[str, Any] = {name: row[name] for name in ("mesh", "dispatch", "ranks_per_node", "masked")}
    redundant = 0 if row["replicas"] == "none" else max(4, int(row["mesh"][-1]))
    micro = None if row["micro_batch_size"] is None else {2: 4, 4: 2, 8: 1}[int(row["mesh"][3])]
    return Case(**fields, micro_batch_size=micro, redundant=redundant, moves=row["replicas"] == "moving")


def named(row: Row) -> str:
    return "-".join(str(value) for value in row.values())


FEATURES = {
    "eight ranks": Case(
        "dp=8,ep=4", dispatch="hierarchical", ranks_per_node=2, redundant=4, moves=True, micro_batch_size=1, masked=True
    ),
    "every expert on every rank": Case("dp=2,ep=1", micro_batch_size=4),
    "an average and recomputation": Case(
        "dp=4,ep=2", redundant=2, config={"ema_decay": 0.9, "recompute": ("norm", "up_projection", "swiglu")}
    ),
    "an average of masters that were the model's parameters until experts moved": Case(
        "dp=2,ep=2", moves=True, config={"ema_decay": 0.9, "parallel": ParallelConfig(mesh="dp=2,ep=2")}
    ),
    "adapters": Case("dp=4,ep=2", redundant=2, moves=True, lora=True),
}


@cache
def _reference(masked: bool, lora: bool, num_layers: int, steps: int, config: str) -> Outcome:
    """Of all cases that differ only in how they are spread."""
    return reference(Case(masked=masked, lora=lora, num_layers=num_layers, config=dict(_CONFIGS[config])), steps)


_CONFIGS: dict[str, dict[str, Any]] = {"": {}, **{name: case.config for name, case in FEATURES.items()}}


def check(case: Case, workers: WorkerPool, config: str = "", steps: int = 20) -> None:
    wanted = _reference(case.masked, case.lora, case.num_layers, steps, config)
    found = workers(case.world_size, timeout=300)(on_a_rank, case, steps)
    for outcome in found:
        assert outcome.loads == wanted.loads
        for ours, theirs in zip(outcome.losses, wanted.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
    for step in wanted.gradients:
        gradients = whole([outcome.gradients[step] for outcome in found])
        difference, name = worst_difference(gradients, wanted.gradients[step])
        assert difference < 1e-8, (step, name)
    # Adam divides by the root of a square that may be tiny, so that twenty steps carry the last digits far.
    difference, name = worst_difference(whole([outcome.state for outcome in found]), wanted.state)
    assert difference < 1e-6, name


@pytest.mark.parametrize("row", pairwise_rows(OPTIONS), ids=named)
def test_losses_and_gradients_are_those_of_one_rank(row: Row, workers: WorkerPool) -> None:
    check(case_of(row), workers, steps=10)  # twenty below, where there is time


@pytest.mark.parametrize("name", FEATURES)
def test_so_they_are_with(name: str, workers: WorkerPool) -> None:
    check(FEATURES[name], workers, name, steps=4)  # experts move once in them


def test_each_module_waits_for_its_own_values(workers: WorkerPool) -> None:
    case = Case("dp=2,ep=2", redundant=2, moves=True)
    wanted = _reference(case.masked, case.lora, case.num_layers, 5, "")
    for outcome in workers(2)(in_small_buckets, case, 5):
        for ours, theirs in zip(outcome.losses, wanted.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_so_they_are_for_longer_with(name: str, workers: WorkerPool) -> None:
    check(FEATURES[name], workers, name)


@pytest.mark.slow
@pytest.mark.parametrize("row", all_rows({**OPTIONS, "mesh": (*OPTIONS["mesh"], "dp=8,ep=4", "dp=8,ep=8")}), ids=named)
def test_losses_and_gradients_in_every_combination(row: Row, workers: WorkerPool) -> None:
    check(case_of(row), workers)


def test_the_covering_set_is_small_and_covers() -> None:
    rows = pairwise_rows(OPTIONS)
    assert len(rows) + len(FEATURES) <= 16
    for one in OPTIONS:
        for other in OPTIONS:
            if one < other:
                pairs = {(row[one], row[other]) for row in rows}
                assert len(pairs) == len(OPTIONS[one]) * len(OPTIONS[other])


def test_a_run_places_its_experts_by_their_loads(workers: WorkerPool) -> None:
    """Between steps, alike on every rank, and no number changes."""
    case = Case("dp=4,ep=4", redundant=4, moves=True, config={"balance": BalanceConfig(bias_speed=0.0)})
    wanted = reference(case)
    found = workers(4, timeout=120)(rebalanced_on_a_rank, case)
    moved, slots, _ = found[0]
    assert SPEC.moe is not None
    assert all(one[:2] == (moved, slots) for one in found)
    assert sum(moved) > 0 and all(count == 0 for step, count in enumerate(moved) if step % 3 != 2)
    assert len(set(slots[0])) == SPEC.moe.num_experts and len(slots[0]) == SPEC.moe.num_experts + 4
    for _, _, outcome in found:
        for ours, theirs in zip(outcome.losses, wanted.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


BOUNDS = {
    # Sums over tokens in another order.
    "float32": 1e-5,
    # A weight's gradient is rounded to BF16 (2^-9 of itself) once on one rank and once on each of four.
    "bfloat16": 2.0**-7,
    # The head, the gate and MTP's projection are in BF16; all else is quantised alike, and added up in FP32.
    "fp8": 2.0**-7,
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_one_step_in_lower_precision(precision: str, workers: WorkerPool) -> None:
    check_one_step(Case("dp=4,ep=2", redundant=2), precision, workers)


def check_one_step(case: Case, precision: str, workers: WorkerPool) -> None:
    """With the routing of one rank: a score's last bit must not send a token elsewhere."""
    config: dict[str, Any] = {"compute": "bfloat16" if precision == "fp8" else precision}
    if precision == "fp8":
        config["precision"] = "fp8"
    case = dataclasses.replace(case, config=config)
    wanted = reference(case, steps=1)
    found = workers(case.world_size)(on_a_rank, dataclasses.replace(case, forced=wanted.routings), 1)
    for outcome in found:
        assert outcome.losses[0][:3] == pytest.approx(wanted.losses[0][:3], rel=1e-6)
        assert outcome.losses[0] == pytest.approx(wanted.losses[0], rel=1e-4)
    difference, name = worst_difference(whole([one.gradients[0] for one in found]), wanted.gradients[0])
    assert difference < BOUNDS[precision], name


HIERARCHICAL_BOUNDS = {
    # Of losses and of gradients.
    "float32": (1e-6, 1e-5),
    # A token's sum over experts is rounded up to three times, at 2^-9 of itself each, and goes through all layers.
    "bfloat16": (2.0**-8, 2.0**-5),
    # A last bit that differs may make the next code: at e4m3 2^-4 of the value.
    "fp8": (2.0**-7, 2.0**-3),
}


@pytest.mark.parametrize("precision", HIERARCHICAL_BOUNDS)
def test_one_step_in_lower_precision_by_way_of_nodes(precision: str, workers: WorkerPool) -> None:
    """Hierarchical dispatch does not promise the bits of one rank: sums are rounded on the way."""
    config: dict[str, Any] = {"compute": "bfloat16" if precision == "fp8" else precision}
    if precision == "fp8":
        config["precision"] = "fp8"
    case = Case("dp=4,ep=2", redundant=2, config=config, dispatch="hierarchical", ranks_per_node=1)
    wanted, (loss_bound, gradient_bound) = reference(case, steps=1), HIERARCHICAL_BOUNDS[precision]
    found = workers(4, timeout=120)(on_a_rank, dataclasses.replace(case, forced=wanted.routings), 1)
    for outcome in found:
        assert outcome.losses[0][:3] == pytest.approx(wanted.losses[0][:3], rel=loss_bound)
    difference, name = worst_difference(whole([one.gradients[0] for one in found]), wanted.gradients[0])
    assert difference < gradient_bound, name


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("fp8", marks=pytest.mark.slow)])
def test_curves_in_lower_precision_are_within_the_noise_of_seeds(precision: str, workers: WorkerPool) -> None:
    config: dict[str, Any] = {"compute": "bfloat16"} | ({"precision": "fp8"} if precision == "fp8" else {})

    def late(outcome: Outcome) -> float:
        return sum(figures[0] for figures in outcome.losses[5:]) / 5

    case = Case("dp=4,ep=4", config=config)
    seeds = [late(reference(dataclasses.replace(case, config={**config, "seed": seed}), 10)) for seed in range(3)]
    found = late(workers(4, timeout=120)(on_a_rank, case, 10)[0])
    assert abs(found - seeds[0]) < (max(seeds) - min(seeds)) / 2
