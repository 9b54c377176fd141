"""Counts over several processes of the engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abyssal.engine.wire import Statistics
from abyssal.serve.observe.totals import COUNTS, EngineTotals


def test_a_restart_goes_on_where_the_last_process_left() -> None:
    totals = EngineTotals()
    totals.update(Statistics(running=3, steps=10, output_tokens=100, drafted=(8, 4), accepted=(6, 1)))
    totals.update(Statistics())
    now = totals.update(Statistics(running=1, steps=2, output_tokens=7, drafted=(1,), accepted=(1,)))
    assert (now.running, now.steps, now.output_tokens) == (1, 12, 107)
    assert (now.drafted, now.accepted) == ((9, 4), (7, 1))


def test_a_process_that_counts_fewer_positions_is_another() -> None:
    totals = EngineTotals()
    totals.update(Statistics(drafted=(5, 5), accepted=(2, 0)))
    assert totals.update(Statistics(drafted=(6,), accepted=(2,))).drafted == (11, 5)


def test_the_same_statistics_twice_count_once() -> None:
    totals, statistics = EngineTotals(), Statistics(output_tokens=5)
    totals.update(statistics)
    totals.update(statistics)
    assert totals.update(Statistics(output_tokens=5)).output_tokens == 5


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=5))
def test_counters_never_fall_and_lose_nothing(processes: list[list[int]]) -> None:
    """Each process is looked at when it is new, and counts up by the given steps."""
    totals, before, total = EngineTotals(), 0, 0
    for growth in processes:
        count = 0
        totals.update(Statistics())
        for more in growth:
            count += more
            now = totals.update(Statistics(**dict.fromkeys(COUNTS, count), drafted=(count,), accepted=(count // 2,)))
            assert now.output_tokens == total + count >= before
            before = now.output_tokens
        total += count
    assert totals.current.drafted == (total,)
