"""The moving lines have everything within 80 columns; without a terminal only the lines that stay are written."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from abyssal.train import progress
from abyssal.train.progress import ProgressDisplay, TimeLeft

STEP = {
    "step": 12000,
    "loss": 10.125,
    "max_violation": 0.5,
    "grad_norm": 1.25,
    "lr": 2e-3,
    "tokens": 49_152_000,
    "tokens_per_second": 1234567.0,
    "share_of_peak": 0.614,
}
VALIDATION = {"step": 0, "loss": 8.5, "bits_per_byte": 3.75, "max_violation": 0.5, "mtp_acceptance": [0.25, 0.125]}
ALARM = {"event": "alarm", "step": 70, "layer": 3, "experts": list(range(9)), "steps": 50}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def display_on(width: int, terminal: bool, clock: Clock | None = None) -> tuple[ProgressDisplay, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    return ProgressDisplay(20000, console, num_tokens=20000 * 4096, clock=clock or Clock()), output


def lines_of(output: io.StringIO) -> list[str]:
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("width", [80, 140])
def test_the_moving_lines_are_whole(width: int) -> None:
    clock = Clock()
    display, output = display_on(width, True, clock)
    with display:
        display.show_validation(VALIDATION)
        for step in (11900, 12000):
            display.show_step(STEP | {"step": step, "tokens": step * 4096})
            clock.now += 50
    lines = lines_of(output)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert re.fullmatch(r"step 12,000/20,000 \S+ +60%  1:06:40 left", lines[-2])
    figures = "loss 10.125  validation 8.500  1,234,567 tokens/s  61% of peak  MaxVio 0.50"
    wide = "  MTP accepted 25.0% 12.5%  learning rate 2.0e-03"
    assert lines[-1] == (figures if width == 80 else figures + wide)


def test_a_terminal_of_80_columns_shows_a_validation_on_one_line() -> None:
    display, output = display_on(80, True)
    display.show_step(STEP)
    display.show_validation(VALIDATION)
    assert lines_of(output) == ["step     0  held out: loss 8.500  3.750 bits per byte  MaxVio 0.50  MTP 25% 12%"]


def test_without_a_terminal_validations_and_events_alone() -> None:
    clock = Clock()
    display, output = display_on(80, False, clock)
    with display:
        display.show_validation(VALIDATION | {"mtp_acceptance": 0.25})
        for step in (1, 2):
            display.show_step(STEP | {"step": step, "tokens": step * 4096})
            clock.now += 2
        display.on_event({"event": "resume", "step": 2})
        display.on_event({"event": "checkpoint", "step": 2})
        display.on_event(ALARM)
        display.show_validation(VALIDATION | {"step": 2, "mtp_acceptance": None})
    assert output.getvalue().splitlines() == [
        "step     0  held out: loss 8.500  3.750 bits per byte  MaxVio 0.50  MTP accepted 25.0%",
        "step     2  resumed",
        "step    70  ALARM: layer 3: 9 of its experts starved for 50 steps: 0, 1, 2, 3, 4, 5, 6, 7, ...",
        "step     2  held out: loss 8.500  3.750 bits per byte  MaxVio 0.50  training loss 10.125  1,234,567 tokens/s"
        "  61% of peak  11:06:36 left",
    ]


def test_a_run_without_a_measured_peak_shows_none() -> None:
    display, output = display_on(80, True)
    with display:
        display.show_step(STEP | {"share_of_peak": None})
    assert lines_of(output)[-1] == "loss 10.125  1,234,567 tokens/s  MaxVio 0.50  learning rate 2.0e-03"


def test_records_are_shown_by_their_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "step_fields", lambda record: record.fields)
    monkeypatch.setattr(progress, "validation_fields", lambda record: record.fields)
    display, output = display_on(200, False)
    display.on_step(cast(Any, SimpleNamespace(fields=STEP)))
    display.on_validation(cast(Any, SimpleNamespace(fields=VALIDATION)))
    assert "held out: loss 8.500" in output.getvalue() and "training loss 10.125" in output.getvalue()


def test_time_left_follows_the_pace_since_the_first_update() -> None:
    clock = Clock()
    left = TimeLeft(1000, clock)
    assert left.seconds() is None
    left.update(400)  # a resumed run: what was done before counts for nothing
    assert left.seconds() is None
    clock.now = 10
    left.update(500)
    assert left.seconds() == 50
    left.update(1001)
    assert left.seconds() == 0


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "--:--"), (59.6, "01:00"), (3723, "1:02:03"), (86400 * 3 + 61, "3 days 0:01:01")]
)
def test_clock(seconds: float | None, shown: str) -> None:
    assert progress._clock(seconds) == shown


def test_a_slow_rank_gets_its_line() -> None:
    console = Console(file=io.StringIO(), width=200)
    display = ProgressDisplay(10, console)
    rank = {"rank": 3, "host": "node-b", "pid": 4711, "own_seconds": 0.62, "median_seconds": 0.2}
    display.on_event({"event": "slow_rank", "step": 7, **rank})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == (
        "step     7  slow: rank 3 (node-b, pid 4711) takes 3.1 times as long as the others, 0.62 s of its own a step"
    )
