"""What a rank's loop tells its watch: steps and their own seconds, phases, where standing still is expected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from abyssal.parallel.launch_meeting import Peer
from abyssal.parallel.watch_slow import SlowRank
from abyssal.train.loop import Loop, build_model
from abyssal.train.metrics import Observer, StepRecord
from abyssal.train.step import RanksResult, Trainer
from abyssal.train.ticker import Ticker
from tests.support.killed_runs import CONFIG, SPEC
from tests.support.run_data import prepare_texts, run_of


class Told:
    """A watch that writes down what it is told."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, bool]] = []
        self.steps: list[tuple[int, float]] = []

    def mark(self, phase: str, patient: bool = False) -> None:
        if not self.marks or self.marks[-1] != (phase, patient):
            self.marks.append((phase, patient))

    def step_done(self, step: int, own_seconds: float) -> None:
        self.steps.append((step, own_seconds))

    def slow_ranks(self) -> list[tuple[SlowRank, Peer]]:
        return [(SlowRank(1, 2, 0.3, 0.1), Peer(1, "node-b", 7, ""))] if len(self.steps) == 2 else []


class Events:
    """An observer that keeps events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_step(self, record: object) -> None: ...

    def on_validation(self, record: object) -> None: ...

    def on_event(self, event: object) -> None:
        self.events.append(event)


def _trainer(tmp_path: Path) -> tuple[Trainer, Any]:
    run = run_of(prepare_texts(tmp_path, [f"number {i} and {i * i} " * 6 for i in range(60)], 300), SPEC, CONFIG)
    return Trainer(build_model(run.spec, run.config), run.config), run.data


def test_phases_of_a_run(tmp_path: Path) -> None:
    """Validations at 0, 9, 18 and 24 of 24 steps."""
    trainer, data = _trainer(tmp_path)
    watch, events = Told(), Events()
    observers = [cast(Observer, events)]
    with Ticker(cast(Any, watch), trainer, observers) as ticker:
        Loop(trainer, ticker.told(data), [*observers, ticker]).run()
    assert watch.marks == [("validating", False), ("training", False)] * 4
    assert [step for step, _ in watch.steps] == list(range(1, 25)) and min(own for _, own in watch.steps) > 0
    assert events.events == [
        {"event": "slow_rank", "step": 2, "rank": 1, "host": "node-b", "pid": 7, "own_seconds": 0.3,
         "median_seconds": 0.1}
    ]  # fmt: skip


def test_a_checkpoint_may_take_its_time_until_rows_are_asked_for(tmp_path: Path) -> None:
    trainer, data = _trainer(tmp_path)
    watch = Told()
    with Ticker(cast(Any, watch), trainer) as ticker:
        ticker.on_event({"event": "checkpoint", "step": 0})
        assert watch.marks == [("saving a checkpoint", True)]
        told = ticker.told(data)
        told.stream.rows(0, 1)
        assert watch.marks[-1] == ("validating", False) and told.stream.fingerprint == data.stream.fingerprint


def test_time_spent_waiting_for_others_is_not_a_ranks_own(tmp_path: Path) -> None:
    trainer, _ = _trainer(tmp_path)
    watch = Told()
    ticker = Ticker(cast(Any, watch), trainer)
    for seconds, waited in ((2.0, 1.5), (5.0, 1.0)):
        result = SimpleNamespace(ranks=RanksResult(waited, 0, 0))
        ticker.on_step(StepRecord(1, cast(Any, result), 4, 96, seconds, 1.0))
    assert [own for _, own in watch.steps] == [0.5, 2.0]
