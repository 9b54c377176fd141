"""A run on the terminal: two lines that move, and one line that stays for each validation.

    step 1,200/20,000 ━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   6%  1:02:03 left
    loss 4.125  validation 4.250  12,345 tokens/s  61% of peak  MaxVio 0.12

They fit in 80 columns; a wider terminal shows more.  Without a terminal only the lines that stay are written.  What is
shown is read from the same fields that ``metrics.jsonl`` has, and a field that a run lacks is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from abyssal.train.metrics import StepRecord, ValidationRecord, step_fields, validation_fields

GAP = "  "
WIDE = 100
"""Columns from which a validation's line spells everything out."""


class ProgressDisplay:
    """An observer that shows loss, validation loss, speed, share of the measured peak, MaxVio and the time left.

    Args:
        num_steps: of the whole run.
        num_tokens: of the whole run, where it is known: the time left then follows tokens, so that a batch size that
            grows does not mislead it.
        clock: seconds; another in tests.
    """

    def __init__(
        self,
        num_steps: int,
        console: Console | None = None,
        num_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._num_steps = num_steps
        self._left = TimeLeft(num_steps if num_tokens is None else num_tokens, clock)
        self._by_tokens = num_tokens is not None
        self._step: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._smooth: dict[str, float] = {}
        self._live = Live(get_renderable=self._moving, console=self._console, refresh_per_second=5)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_step(self, record: StepRecord) -> None:
        self.show_step(step_fields(record))

    def on_validation(self, record: ValidationRecord) -> None:
        self.show_validation(validation_fields(record))

    def on_event(self, event: Mapping[str, Any]) -> None:
        """An alarm, a resume or a slow rank, as ``metrics.jsonl`` has it, gets its line; other events none."""
        if event.get("event") == "alarm":
            self._console.print(Text(_alarm(event), style="bold red"), soft_wrap=True)
        elif event.get("event") == "resume":
            self._console.print(f"step {event['step']:>5}  resumed", highlight=False, soft_wrap=True)
        elif event.get("event") == "slow_rank":
            self._console.print(Text(_slow_rank(event), style="bold red"), soft_wrap=True)

    def show_step(self, fields: dict[str, Any]) -> None:
        """A step, as ``metrics.jsonl`` has it."""
        self._step = fields
        for name in ("loss", "tokens_per_second", "share_of_peak"):
            value = fields.get(name)
            if value is not None:
                self._smooth[name] = 0.9 * self._smooth.get(name, float(value)) + 0.1 * value
        self._left.update(fields["tokens"] if self._by_tokens else fields["step"])

    def show_validation(self, fields: dict[str, Any]) -> None:
        """A validation, as ``metrics.jsonl`` has it."""
        self._validation = fields
        figures = [
            f"step {fields['step']:>5}",
            f"held out: loss {fields['loss']:.3f}",
            f"{fields['bits_per_byte']:.3f} bits per byte",
            f"MaxVio {fields['max_violation']:.2f}",
            *_accepted(fields, brief=self._console.is_terminal and self._console.width < WIDE),
        ]
        if "loss" in self._smooth:
            figures.append(f"training loss {self._smooth['loss']:.3f}")
        figures += self._speed()
        if self._left.seconds():
            figures.append(f"{_clock(self._left.seconds())} left")
        width = self._console.width if self._console.is_terminal else None
        self._console.print(_fitting(figures, width), highlight=False, soft_wrap=True)

    def _speed(self) -> list[str]:
        figures = []
        if "tokens_per_second" in self._smooth:
            figures.append(f"{self._smooth['tokens_per_second']:,.0f} tokens/s")
        if "share_of_peak" in self._smooth:
            figures.append(f"{self._smooth['share_of_peak']:.0%} of peak")
        return figures

    def _moving(self) -> RenderableType:
        done = self._step.get("step", self._validation.get("step", 0))
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._num_steps, completed=done)
        end = f"{done / self._num_steps:>4.0%}  {_clock(self._left.seconds())} left"
        line.add_row(f"step {done:,}/{self._num_steps:,}", bar, end)
        return Group(line, Text(_fitting(self._figures(), self._console.width), style="cyan", no_wrap=True))

    def _figures(self) -> list[str]:
        """Of the second line, the most important first."""
        step, figures = self._step, []
        if "loss" in self._smooth:
            figures.append(f"loss {self._smooth['loss']:.3f}")
        if "loss" in self._validation:
            figures.append(f"validation {self._validation['loss']:.3f}")
        figures += self._speed()
        if step:
            figures.append(f"MaxVio {step['max_violation']:.2f}")
        figures += _accepted(self._validation)
        if step:
            figures += [f"learning rate {step['lr']:.1e}", f"gradient norm {step['grad_norm']:.2f}"]
            figures.append(f"{step['tokens']:,} tokens")
        return figures


class TimeLeft:
    """Estimates the time to ``total`` from the pace since the first update, validations and saves included."""

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._begin: tuple[float, float] | None = None
        self._now: tuple[float, float] | None = None

    def update(self, done: float) -> None:
        self._now = (self._clock(), done)
        self._begin = self._begin or self._now

    def seconds(self) -> float | None:
        """None until there were two updates."""
        if self._begin is None or self._now is None or self._now[1] <= self._begin[1]:
            return None
        pace = (self._now[0] - self._begin[0]) / (self._now[1] - self._begin[1])
        return max(0.0, (self._total - self._now[1]) * pace)


def _clock(seconds: float | None) -> str:
    """``12:34``, ``1:02:03`` or ``3 days 1:02:03``."""
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
    return f"{days} day{'s' * (days > 1)} {clock}" if days else clock


def _accepted(validation: Mapping[str, Any], brief: bool = False) -> list[str]:
    """What share of MTP's drafts is accepted: one number, or one of each depth."""
    shares = validation.get("mtp_acceptance")
    if shares is None or shares == []:
        return []
    shares = shares if isinstance(shares, Iterable) else [shares]
    if brief:
        return [f"MTP {' '.join(f'{share:.0%}' for share in shares)}"]
    return [f"MTP accepted {' '.join(f'{share:.1%}' for share in shares)}"]


def _slow_rank(event: Mapping[str, Any]) -> str:
    own, others = event["own_seconds"], event["median_seconds"]
    return (
        f"step {event['step']:>5}  slow: rank {event['rank']} ({event['host']}, pid {event['pid']}) takes "
        f"{own / others:.1f} times as long as the others, {own:.3g} s of its own a step"
    )


def _alarm(event: Mapping[str, Any]) -> str:
    experts = list(event["experts"])
    named = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return (
        f"step {event['step']:>5}  ALARM: layer {event['layer']}: {len(experts)} of its experts starved for "
        f"{event['steps']} steps: {named}"
    )


def _fitting(figures: list[str], width: int | None) -> str:
    """As many as fit in ``width`` columns, all of them without one; the first is never left out."""
    line = figures[0] if figures else ""
    for figure in figures[1:]:
        if width is not None and len(line) + len(GAP) + len(figure) > width:
            break
        line += GAP + figure
    return line
