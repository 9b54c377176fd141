"""Running arms: the text prepared once, one run folder an arm and a seed.

OUT/data/                    the tokens
OUT/runs/ARM/seed-N/         as support/runs.py says
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.record import header
from support.runs import Runs, steps

from abyssal.data.batch import Batch
from abyssal.data.shards import PreparedData
from abyssal.spec.model import ModelSpec
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData, fitted, pretraining_data
from abyssal.train.folder import RunFolder
from abyssal.train.loop import TrainResult
from abyssal.train.run import Run

from .arms import MODEL, Arm, Scale


def limited_data(source: PreparedData, spec: ModelSpec, config: TrainConfig) -> TrainingData:
    """The rows of a run; all of the held-out text would take longer than the steps do."""
    data = pretraining_data([source], spec, config)

    def held_out(num_batches: int | None) -> Iterator[Batch]:
        return data.held_out(config.validation_batches if num_batches is None else num_batches)

    return replace(data, held_out=held_out)


@dataclass(frozen=True)
class Suite:
    """Where runs lie and how long they are."""

    out: Path
    scale: Scale
    data: PreparedData

    @property
    def runs(self) -> Runs:
        return Runs(self.out / "runs")

    def run(self, arm: Arm, seed: int) -> Run:
        """What is trained for an arm at a seed."""
        spec = fitted(MODEL, self.data.tokenizer())
        config = self.scale.config(arm, seed)
        return Run(spec, config, limited_data(self.data, spec, config))

    def results(self, arm: Arm, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Those of the seeds that are finished.

        Raises:
            ValueError: a folder holds another run, such as of an earlier version of this benchmark.
        """
        results = self.runs.results(arm.name, seeds)
        for seed in results:
            self.runs.check(arm.name, seed, self.run(arm, seed))
        return results

    def train(self, arm: Arm, seed: int) -> bool:
        """Bring a run to its end; False if it was there.

        Raises:
            ValueError: the folder holds another run.
        """
        return self.runs.train(arm.name, seed, self.run(arm, seed), found)


def found(result: TrainResult, folder: RunFolder) -> dict[str, Any]:
    """What is needed of a finished run, as JSON."""
    lines = steps(folder)
    assert len(lines) == result.trainer.plan.num_steps, "metrics.jsonl lacks steps"
    tokens = result.tokens / len(lines)
    return {
        **header(),
        "losses": [line["loss"] for line in lines],
        "step_seconds": round(statistics.median(tokens / line["tokens_per_second"] for line in lines), 4),
        "validation_loss": result.evaluation.loss,
        "held_out_tokens": result.evaluation.num_tokens,
        "total_parameters": result.model.spec.total_parameters,
    }
