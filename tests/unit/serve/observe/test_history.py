"""Rates of the last minutes."""

from __future__ import annotations

import json

import pytest

from abyssal.engine.wire import Statistics
from abyssal.serve.observe.board import EXPERTS_EVERY, Board
from abyssal.serve.observe.figures import Figures
from abyssal.serve.observe.history import KEPT, RATE_SAMPLES, History
from abyssal.serve.observe.totals import EngineTotals
from tests.support.watched import Clock, StandIn


def history(figures: Figures | None = None) -> tuple[History, Clock]:
    clock = Clock()
    return History(figures or Figures(clock), clock, clock), clock


def test_counts_become_rates_of_the_last_seconds() -> None:
    samples, clock = history()
    clock.now += 2
    now = Statistics(output_tokens=40, prompt_tokens=100, memory_hit_tokens=60, disk_hit_tokens=20, step_seconds=1.0)
    sample = samples.take(now)
    assert (sample.output_rate, sample.prompt_rate) == (20, 50)
    assert (sample.memory_rate, sample.disk_rate, sample.computed_rate) == (30, 10, 10)
    assert sample.busy == 0.5
    rates = []
    for _ in range(RATE_SAMPLES + 1):
        clock.now += 1
        rates.append(samples.take(now).output_rate)
    assert rates == [pytest.approx(40 / 3, abs=1e-3), 10, 8, 0, 0]


def test_pages_are_a_share_and_none_is_no_division() -> None:
    samples, _ = history()
    assert samples.take(Statistics()).pages == 0
    sample = samples.take(Statistics(used_pages=3, total_pages=12))
    assert (sample.pages, sample.used_pages, sample.total_pages) == (0.25, 3, 12)


def test_latencies_are_of_recent_requests_and_absent_without() -> None:
    clock = Clock()
    figures = Figures(clock)
    samples = History(figures, clock, clock)
    assert (samples.take(Statistics()).first_token, samples.take(Statistics()).between_tokens) == (None, None)
    for seconds in (0.1, 0.2, 5.0):
        figures.first_token(figures.model("m"), seconds)
    figures.model("m").between_tokens.add(0.02, 3)
    sample = samples.take(Statistics())
    assert (sample.first_token, sample.between_tokens) == (0.2, pytest.approx(0.02))
    clock.now += 31
    for _ in range(RATE_SAMPLES):
        samples.take(Statistics())
    assert (samples.take(Statistics()).first_token, samples.take(Statistics()).between_tokens) == (None, None)


def test_only_the_last_minutes_are_kept() -> None:
    samples, clock = history()
    for index in range(KEPT + 5):
        clock.now += 1
        samples.take(Statistics(running=index))
    columns = samples.columns()
    assert {len(column) for column in columns.values()} == {KEPT}
    assert columns["running"][-1] == KEPT + 4


def test_drafts_are_of_the_last_samples_that_had_any() -> None:
    samples, _ = history()
    assert samples.drafts() == []
    samples.take(Statistics(drafted=(100, 50), accepted=(90, 10)))
    for step in range(1, 61):
        samples.take(Statistics(drafted=(100 + step, 50 + step), accepted=(90, 10 + step)))
    for _ in range(100):  # without drafts nothing changes
        samples.take(Statistics(drafted=(160, 110), accepted=(90, 70)))
    first, second = samples.drafts()
    assert (first.drafted, first.accepted) == (60, 0)
    assert (second.drafted, second.accepted) == (60, 60)


def board(service: StandIn, figures: Figures, clock: Clock, currency: str | None = "USD") -> Board:
    return Board("tiny", service, EngineTotals(), figures, currency, clock, clock)


def test_a_snapshot_says_how_the_server_stands() -> None:
    clock, service = Clock(), StandIn(expert_layers=(1, 3))
    figures = Figures(clock)
    shown = board(service, figures, clock)
    service.change(running=2, waiting=1, used_pages=1, total_pages=4, output_tokens=30, disk_bytes=7)
    service.change(expert_loads=((0.5, 0.25, 0.25, 0.0), (0.25, 0.25, 0.25, 0.25)))
    figures.model("tiny").saved = 1_250_000
    clock.now += 3
    shown.tick()
    told = shown.snapshot()
    assert (told["model"], told["state"], told["uptime"]) == ("tiny", "ready", 3.0)
    assert told["now"]["running"] == 2 and told["now"]["output_rate"] == 10
    assert told["totals"]["disk_bytes"] == 7
    assert told["saved"] == {"nano": 1_250_000, "currency": "USD", "priced": True}
    assert told["experts"] == {"layers": [1, 3], "loads": [[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]}
    assert len(told["history"]["time"]) == 2
    json.dumps(told, allow_nan=False)


def test_samples_carry_expert_loads_now_and_then() -> None:
    clock = Clock()
    shown = board(StandIn(statistics=Statistics(expert_loads=((1.0,),))), Figures(clock), clock)
    carried = []
    for _ in range(2 * EXPERTS_EVERY):
        shown.tick()
        carried.append("experts" in shown.sample())
    assert sum(carried) == 2


def test_without_prices_nothing_is_said_of_money() -> None:
    clock = Clock()
    assert board(StandIn(), Figures(clock), clock, None).snapshot()["saved"]["priced"] is False


def test_layers_that_the_engine_has_not_named_are_counted() -> None:
    clock = Clock()
    service = StandIn(statistics=Statistics(expert_loads=((1.0,), (1.0,))))
    assert board(service, Figures(clock), clock).snapshot()["experts"]["layers"] == [0, 1]
