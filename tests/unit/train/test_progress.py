"""The moving line has everything within 80 columns; without a terminal only validations are written."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from abyssal.train.evaluate import Evaluation
from abyssal.train.metrics import StepRecord, ValidationRecord
from abyssal.train.progress import WIDE, ProgressDisplay
from abyssal.train.step import StepResult

LOADS = {1: torch.tensor([6, 2])}
STEP = StepRecord(12000, StepResult(10.125, 11.0, 0.0, 1.0, 2e-3, LOADS), 512, 61.0, 123456.0)
VALIDATION = ValidationRecord(0, Evaluation(8.5, 3.75, 10, 30, 9.0, 0.25, 0.1, LOADS), 0.0)


def shown(width: int, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    with ProgressDisplay(20000, console) as display:
        display.on_validation(VALIDATION)
        display.on_step(STEP)
    return output.getvalue()


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_line_is_whole(width: int) -> None:
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown(width, terminal=True)))
    line = next(line for line in reversed(lines) if "tokens/s" in line)
    assert len(line) <= width and "…" not in line
    assert re.match(r"step 12000/20000 \S+ +loss 10\.125  123,456 tokens/s  MaxVio 0\.50  ?.*(\d\d|--):(\d\d|--)", line)
    assert ("val 8.500  lr 2.0e-03" in line) == (width >= WIDE)


def test_without_a_terminal_validations_alone() -> None:
    assert shown(80, terminal=False) == (
        "step     0  held out: loss 8.500  3.750 bits per byte  MaxVio 0.50  MTP accepted 25.0%\n"
    )
