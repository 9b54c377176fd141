"""What a run leaves behind besides its model: resolved configuration, environment, and one JSON line for each event.

``metrics.jsonl`` has two kinds of lines, told apart by ``event``: ``step`` and ``validation``; each is flushed as it is
written, so a run that dies leaves everything up to its last step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from abyssal.train.evaluate import Evaluation
from abyssal.train.step import StepResult


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step as observers see it."""

    step: int
    """Steps done, from 1."""
    result: StepResult
    tokens: int
    """Trained on so far."""
    seconds: float
    """Spent in training steps so far, validation not counted."""
    tokens_per_second: float
    """Of this step."""


@dataclasses.dataclass(frozen=True)
class ValidationRecord:
    """One validation."""

    step: int
    """Steps done."""
    evaluation: Evaluation
    seconds: float
    """Spent in training steps so far."""


class Observer(Protocol):
    """Something that watches a run."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_validation(self, record: ValidationRecord) -> None: ...


def step_fields(record: StepRecord) -> dict[str, Any]:
    """A step as JSON."""
    result = record.result
    return {
        "event": "step",
        "step": record.step,
        "loss": result.loss,
        "mtp_loss": result.mtp_loss,
        "balance_loss": result.balance_loss,
        "max_violation": result.max_violation,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": record.tokens,
        "tokens_per_second": round(record.tokens_per_second, 1),
        "seconds": round(record.seconds, 3),
    }


def validation_fields(record: ValidationRecord) -> dict[str, Any]:
    """A validation as JSON; ``loads``: by layer, tokens sent to each expert."""
    evaluation = record.evaluation
    return {
        "event": "validation",
        "step": record.step,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "mtp_loss": evaluation.mtp_loss,
        "mtp_acceptance": evaluation.mtp_acceptance,
        "mtp_unigram_rate": evaluation.mtp_unigram_rate,
        "max_violation": evaluation.max_violation,
        "num_tokens": evaluation.num_tokens,
        "num_bytes": evaluation.num_bytes,
        "seconds": round(record.seconds, 3),
        "loads": {str(layer): load_E.tolist() for layer, load_E in evaluation.loads.items()},
    }


class MetricsFile:
    """``metrics.jsonl`` of a run; an observer, and a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", encoding="utf-8")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_step(self, record: StepRecord) -> None:
        self._write(step_fields(record))

    def on_validation(self, record: ValidationRecord) -> None:
        self._write(validation_fields(record))

    def _write(self, fields: dict[str, Any]) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def environment() -> dict[str, Any]:
    """Where the run takes place, as far as it can change its numbers or its speed."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
