"""Load on a server with a clock of the test's own: arrivals, what is counted from when, closed loops."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.engine_parts.load import ClosedLoad, Event, Job, OpenLoad, Served, poisson, serve, summary, synthetic
from benchmarks.engine_parts.statistics import percentile, percentiles, round_ratios, steady


class Clock:
    """Time that passes when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class OneByOne:
    """A server that answers a request a step, each token taking a second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Job] = deque()

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def step(self) -> list[Event]:
        job = self._waiting.popleft()
        events = []
        for count in range(1, job.new_tokens + 1):
            self._clock.now += 1.0
            events.append(Event(job.number, self._clock.now, count, count == job.new_tokens, cached=2))
        return events


def job(number: int, at: float, new_tokens: int = 2) -> Job:
    return Job(number, at, (5, 6, 7, 8), new_tokens)


def run(load: OpenLoad | ClosedLoad) -> list[Served]:
    clock = Clock()
    return serve(OneByOne(clock), load, clock, clock.sleep)


def test_an_open_request_waits_from_when_it_was_due_not_from_when_it_was_taken() -> None:
    first, second = run(OpenLoad([job(0, 0.0, 4), job(1, 0.5)]))
    assert (first.arrival, first.first, first.last) == (0.0, 1.0, 4.0)
    assert (second.arrival, second.first, second.last) == (0.5, 5.0, 6.0)
    assert second.first_token_seconds == 4.5 and second.seconds_a_token == 1.0


def test_an_idle_server_sleeps_until_the_next_arrival() -> None:
    first, second = run(OpenLoad([job(1, 10.0), job(0, 0.0)]))
    assert (first.last, second.arrival, second.first_token_seconds) == (2.0, 10.0, 1.0)


def test_clients_of_a_closed_load_send_when_they_are_answered() -> None:
    served = run(ClosedLoad([job(number, 99.0) for number in range(4)], clients=2))
    assert [each.arrival for each in served] == [0.0, 0.0, 2.0, 4.0]
    assert [each.first_token_seconds for each in served] == [1.0, 3.0, 3.0, 3.0]


def test_a_closed_load_of_fewer_requests_than_clients_ends() -> None:
    assert len(run(ClosedLoad([job(0, 0.0)], clients=8))) == 1


def test_summary_counts_all_requests() -> None:
    found = summary(run(OpenLoad([job(0, 0.0, 4), job(1, 0.5)])))
    assert found["requests"] == 2 and found["seconds"] == 6.0
    assert found["output_tokens_per_second"] == 1.0
    assert found["tokens_per_second"] == pytest.approx(14 / 6)
    assert found["cached_share"] == 0.5
    assert found["waiting_for_first_token"] == pytest.approx((1.0 + 4.5) / 6)
    assert found["first_token_seconds"] == {"p50": 1.0, "p90": 4.5, "p99": 4.5}


def test_requests_of_one_token_have_no_seconds_a_token() -> None:
    found = summary(run(OpenLoad([job(0, 0.0, 1), job(1, 0.0, 3)])))
    assert found["seconds_a_token"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0}


def test_poisson_has_the_rate_asked_for_and_keeps_the_requests() -> None:
    jobs = synthetic(4000, 100, (1, 8), (1, 4))
    arrivals = poisson(jobs, per_second=20.0)
    assert arrivals[-1].at == pytest.approx(200.0, rel=0.06)
    gaps = [after.at - before.at for before, after in pairwise(arrivals)]
    assert min(gaps) >= 0 and sum(gap < 0.05 for gap in gaps) / len(gaps) == pytest.approx(1 - 2.718**-1, abs=0.04)
    assert [replace(each, at=0.0) for each in arrivals] == jobs
    assert poisson(jobs, 20.0) == arrivals


def test_synthetic_requests_stay_within_their_bounds() -> None:
    jobs = synthetic(500, 50, (3, 9), (2, 5))
    assert {len(each.prompt) for each in jobs} == set(range(3, 10))
    assert {each.new_tokens for each in jobs} == set(range(2, 6))
    assert all(2 <= token < 50 for each in jobs for token in each.prompt)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 1.0), (25, 1.0), (50, 2.0), (51, 3.0), (75, 3.0), (99, 4.0), (100, 4.0)]
)
def test_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="101"):
        percentile([1.0], 101)
    assert percentiles([]) == {}


def test_steady_leaves_the_first_steps_out() -> None:
    assert steady([0.0, 9.0, 10.0, 12.0, 13.0], skip=1) == 1.0
    assert steady([0.0, 9.0, 10.0], skip=0) == 5.0


def test_ratios_are_to_the_peer_of_the_best_median() -> None:
    best, ratio, each = round_ratios([30.0, 40.0, 50.0], {"a": [10.0, 20.0, 100.0], "b": [25.0, 25.0, 25.0]})
    assert (best, ratio, each) == ("b", 1.6, [1.2, 1.6, 2.0])
