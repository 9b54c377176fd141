"""The placement record: whatever is built of it is consistent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.spec.placement import Placement


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_experts = draw(st.integers(1, 12))
    extra = draw(st.lists(st.integers(0, num_experts - 1), max_size=12))
    slots = draw(st.permutations([*range(num_experts), *extra]))
    divisors = [count for count in range(1, len(slots) + 1) if len(slots) % count == 0]
    return Placement(num_experts, tuple(slots), draw(st.sampled_from(divisors)))


@given(placements())
def test_tables_agree_with_the_slots(placement):
    table = placement.replica_table()
    assert sorted(slot for slots in table for slot in slots) == list(range(placement.num_slots))
    for expert, slots in enumerate(table):
        assert slots == placement.replicas(expert) and slots == tuple(sorted(slots)) and slots
        assert all(placement.slots[slot] == expert for slot in slots)
    ranks = [placement.slots_of_rank(rank) for rank in range(placement.num_ranks)]
    assert [slot for slots in ranks for slot in slots] == list(range(placement.num_slots))
    assert {len(slots) for slots in ranks} == {placement.slots_per_rank}
    assert all(placement.rank_of_slot(slot) == rank for rank, slots in enumerate(ranks) for slot in slots)


def test_identity():
    placement = Placement.identity(8, num_ranks=4)
    assert placement.slots == tuple(range(8)) and placement.is_identity
    assert placement.slots_of_rank(1) == (2, 3)
    assert placement.replicas(5) == (5,)
    assert not Placement(2, (0, 1, 0)).is_identity and not Placement(2, (1, 0)).is_identity


@pytest.mark.parametrize(
    ("num_experts", "slots", "num_ranks", "named"),
    [
        (0, (), 1, "placement.num_experts is 0"),
        (3, (0, 1), 1, "placement.slots has no slot for expert 2"),
        (2, (0, 1, 2), 1, r"placement.slots\[2\] is 2"),
        (2, (0, -1), 1, r"placement.slots\[1\] is -1"),
        (2, (0, 1, 0), 2, "placement.num_ranks is 2"),
        (2, (0, 1), 0, "placement.num_ranks is 0"),
    ],
)
def test_a_broken_placement_is_refused_by_name(num_experts, slots, num_ranks, named):
    with pytest.raises(ValueError, match=named):
        Placement(num_experts, slots, num_ranks)


def test_indices_out_of_range():
    placement = Placement.identity(4, num_ranks=2)
    for call in (placement.slots_of_rank, placement.replicas, placement.rank_of_slot):
        with pytest.raises(IndexError):
            call(-1)
        with pytest.raises(IndexError):
            call(4)
