"""A run on the terminal: one line that moves, and one line that stays for each validation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from abyssal.train.metrics import StepRecord, ValidationRecord

WIDE = 110
"""Columns from which the line has room for the validation loss and the learning rate; the rest fits in 80."""


class ProgressDisplay:
    """An observer that shows step, loss, tokens a second, MaxVio and time left; on a wide terminal more.

    Without a terminal only the validation lines are written.
    """

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        columns = (
            TextColumn("step {task.completed:>5}/{task.total}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        self._console = console or Console(stderr=True)
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("train", total=num_steps, figures="")
        self._loss: float | None = None
        self._speed: float | None = None
        self._validation = float("nan")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step(self, record: StepRecord) -> None:
        result = record.result
        self._loss = _smoothed(self._loss, result.loss)
        self._speed = _smoothed(self._speed, record.tokens_per_second)
        figures = f"loss {self._loss:.3f}  {self._speed:,.0f} tokens/s  MaxVio {result.max_violation:.2f}"
        if self._console.width >= WIDE:
            figures += f"  val {self._validation:.3f}  lr {result.lr:.1e}"
        self._bar.update(self._task, completed=record.step, figures=figures)

    def on_validation(self, record: ValidationRecord) -> None:
        evaluation = record.evaluation
        self._validation = evaluation.loss
        drafts = "" if evaluation.mtp_acceptance is None else f"  MTP accepted {evaluation.mtp_acceptance:.1%}"
        speed = "" if self._speed is None else f"  {self._speed:,.0f} tokens/s"
        self._console.print(
            f"step {record.step:>5}  held out: loss {evaluation.loss:.3f}  {evaluation.bits_per_byte:.3f} bits per byte"
            f"  MaxVio {evaluation.max_violation:.2f}{drafts}{speed}",
            highlight=False,
            soft_wrap=True,
        )


def _smoothed(average: float | None, value: float) -> float:
    return value if average is None else 0.9 * average + 0.1 * value
