"""What a run leaves behind besides its model: resolved configuration, environment, and one JSON line for each event.

Lines of ``metrics.jsonl`` are told apart by ``event``: ``step``, ``validation``, ``alarm`` (an expert starved),
``checkpoint``, ``resume``, ``slow_rank`` (one of many ranks holds the others up), ``placement`` (experts moved between
ranks).  Each is flushed as it is written, so a run that dies leaves everything up to its last step;
a run that resumes drops what came after its checkpoint, which it will do again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from abyssal.train.balance import max_violation
from abyssal.train.evaluate import Evaluation
from abyssal.train.step import StepResult


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step as observers see it."""

    step: int
    """Steps done, from 1."""
    result: StepResult
    batch_size: int
    """Rows of this step."""
    tokens: int
    """Trained on so far."""
    seconds: float
    """Spent in training steps so far, validation not counted."""
    tokens_per_second: float
    """Of this step."""
    share_of_peak: float | None = None
    """Of the machine's measured matrix-product peak that this step reached; None where it was not measured."""


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

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Anything else, as ``metrics.jsonl`` has it."""
        ...


def step_fields(record: StepRecord) -> dict[str, Any]:
    """A step as JSON."""
    result = record.result
    return {
        "event": "step",
        "step": record.step,
        "loss": result.loss,
        "mtp_losses": list(result.mtp_losses),
        "balance_loss": result.balance_loss,
        "max_violation": result.max_violation,
        "max_violation_by_layer": {str(layer): round(value, 6) for layer, value in result.violations.items()},
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "mtp_weight": result.mtp_weight,
        "bias_speed": result.bias_speed,
        "batch_size": record.batch_size,
        "tokens": record.tokens,
        "tokens_per_second": round(record.tokens_per_second, 1),
        "share_of_peak": None if record.share_of_peak is None else round(record.share_of_peak, 4),
        "seconds": round(record.seconds, 3),
        **({} if result.ranks is None else {"ranks": dataclasses.asdict(result.ranks)}),
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
        "mtp_losses": list(evaluation.mtp_losses),
        "mtp_acceptance": list(evaluation.mtp_acceptance),
        "mtp_chain": list(evaluation.mtp_chain),
        "mtp_unigram_rate": list(evaluation.mtp_unigram_rate),
        "max_violation": evaluation.max_violation,
        "max_violation_by_layer": {str(layer): max_violation(load_E) for layer, load_E in evaluation.loads.items()},
        "num_tokens": evaluation.num_tokens,
        "num_bytes": evaluation.num_bytes,
        "seconds": round(record.seconds, 3),
        "loads": {str(layer): load_E.tolist() for layer, load_E in evaluation.loads.items()},
    }


class MetricsFile:
    """``metrics.jsonl`` of a run; an observer, and a context manager that closes it.

    Args:
        resumed_at: steps done by the checkpoint that the run goes on from: later lines are dropped.  None starts anew.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        if resumed_at is not None and path.exists():
            _keep_until(path, resumed_at)
        self._file = path.open("w" if resumed_at is None else "a", encoding="utf-8")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_step(self, record: StepRecord) -> None:
        self._write(step_fields(record))

    def on_validation(self, record: ValidationRecord) -> None:
        self._write(validation_fields(record))

    def on_event(self, event: Mapping[str, Any]) -> None:
        self._write(dict(event))

    def _write(self, fields: dict[str, Any]) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def _keep_until(path: Path, step: int) -> None:
    """Drop lines after the checkpoint of ``step``, and a last line that a kill cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            break
        if fields.get("step", 0) > step:
            break
        kept.append(line + "\n")
        if fields["event"] == "checkpoint" and fields["step"] == step:
            break  # what follows, such as the last validation, will be done again
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
