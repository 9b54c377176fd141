"""Runs by arm and seed: one folder each, finished ones skipped, broken ones resumed.

FOLDER/ARM/seed-N/       run.json, metrics.jsonl, checkpoints while it lasts, result.json when it is done
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abyssal.train.folder import RunFolder, write_json
from abyssal.train.loop import TrainResult
from abyssal.train.run import Run, check_same_run, run_training

Finder = Callable[[TrainResult, RunFolder], dict[str, Any]]
"""What is kept of a finished run, as JSON."""


@dataclass(frozen=True)
class Runs:
    """The folder of all of them."""

    path: Path

    def folder(self, arm: str, seed: int) -> RunFolder:
        return RunFolder(self.path / arm / f"seed-{seed}")

    def result(self, arm: str, seed: int) -> dict[str, Any] | None:
        """What a finished run found; None while it is not finished."""
        path = self.folder(arm, seed).path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def results(self, arm: str, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Those of the seeds that are finished."""
        return {seed: result for seed in seeds if (result := self.result(arm, seed)) is not None}

    def check(self, arm: str, seed: int, run: Run) -> None:
        """Refuse results of another run than ``run``.

        Raises:
            ValueError: naming the first difference.
        """
        check_same_run(self.folder(arm, seed).record, json.loads(json.dumps(run.record())))

    def train(self, arm: str, seed: int, run: Run, found: Finder) -> bool:
        """Bring a run to its end; False if it was there.

        Raises:
            ValueError: the folder holds another run.
        """
        folder = self.folder(arm, seed)
        if self.result(arm, seed) is not None:
            self.check(arm, seed, run)
            return False

        def save(result: TrainResult) -> None:
            write_json(folder.path / "result.json", found(result, folder))

        run_training(folder, run, resume=True, save=save, measure_peak=False)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return True


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are steps, in order."""
    lines = (json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "step"]
