"""The rebalancer: when it looks, by which loads, what it leaves alone, and that a checkpoint loses none of it."""

from __future__ import annotations

import json

import pytest

from abyssal.parallel.placement import balancedness, initial_placement
from abyssal.parallel.placement_rebalancer import Rebalancer

EVEN = [10] * 8
SKEWED = [100, 10, 10, 10, 10, 10, 10, 10]


def started(**changes) -> tuple[Rebalancer, dict]:
    rebalancer = Rebalancer(**{"every": 5, "redundant": 4, "num_ranks": 4, **changes})
    first = initial_placement(8, rebalancer.redundant, 4)
    return rebalancer, {1: first, 2: first}


def test_it_is_due_every_so_many_steps_and_never_with_0():
    rebalancer, _ = started()
    assert [step for step in range(16) if rebalancer.due(step)] == [5, 10, 15]
    assert not any(started(every=0)[0].due(step) for step in range(16))


def test_the_layers_that_are_uneven_change_and_no_other():
    rebalancer, current = started()
    rebalancer.add({1: EVEN, 2: SKEWED})
    changed = rebalancer.placements(current)
    assert changed is not None and set(changed) == {2}
    assert balancedness(changed[2], SKEWED) > balancedness(current[2], SKEWED)
    rebalancer.add({1: EVEN, 2: SKEWED})
    assert rebalancer.placements({**current, **changed}) is None, "balanced enough now"


def test_loads_are_those_since_the_last_look():
    rebalancer, current = started()
    rebalancer.add({1: SKEWED, 2: SKEWED})
    first = rebalancer.placements(current)
    assert first is not None
    rebalancer.add({1: EVEN, 2: list(reversed(SKEWED))})
    second = rebalancer.placements(first)
    assert second is not None and balancedness(second[2], SKEWED[::-1]) > balancedness(first[2], SKEWED[::-1])
    assert rebalancer.placements(first) is None, "nothing was counted since"


def test_steps_add_up():
    """Two steps that are uneven each, and even together."""
    rebalancer, current = started(redundant=0)
    for loads in ([20, 20, 0, 0, 20, 20, 0, 0], [0, 0, 20, 20, 0, 0, 20, 20]):
        rebalancer.add({1: loads, 2: loads})
    assert rebalancer.placements(current) is None
    rebalancer.add({1: [20, 20, 0, 0, 20, 20, 0, 0], 2: EVEN})
    changed = rebalancer.placements(current)
    assert changed is not None and set(changed) == {1}


def test_a_state_goes_through_json_and_decides_as_it_would_have():
    rebalancer, current = started()
    rebalancer.add({1: SKEWED, 2: EVEN})
    again, _ = started()
    again.load_state(json.loads(json.dumps(rebalancer.state())))
    for one in (rebalancer, again):
        one.add({1: SKEWED, 2: EVEN})
    assert again.state() == rebalancer.state() == {"loads": {"1": [2 * n for n in SKEWED], "2": [2 * n for n in EVEN]}}
    assert again.placements(current) == rebalancer.placements(current) is not None
    assert again.state() == {"loads": {}}


@pytest.mark.parametrize("name", ["every", "redundant", "tolerance"])
def test_numbers_below_0_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        started(**{name: -1})
