"""A run's folder: names inside it, and files that appear whole or not at all.  Free of torch.

    RUN/run.json          resolved configuration and environment
    RUN/metrics.jsonl     one line a step, a validation, an alarm
    RUN/tokenizer/        what made the tokens
    RUN/data/             the tokens, where the run prepared its own text
    RUN/checkpoints/      the newest few states, to go on from
    RUN/model/            a Hugging Face folder with its tokenizer; there once training is done, and then whole
    RUN/model-average/    the same of the average of the parameters, where one was kept

A run that is interrupted leaves all but the last two.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """Names inside a run's folder."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def average(self) -> Path:
        return self.path / "model-average"

    def check_free(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ValueError: it exists and is not empty, or is no folder.
        """
        if self.path.exists() and (
            not self.path.is_dir() or any(not _is_left_over(one) for one in self.path.iterdir())
        ):
            hint = "go on with --resume, give another --out" if self.record.exists() else "give another --out"
            raise ValueError(f"{self.path}: exists and is not an empty folder; {hint}, or remove it first")

    def check_room(self, model_bytes: int, checkpoint_bytes: int = 0) -> None:
        """Refuse a disk without room for the model and the checkpoints, before anything is trained.

        Raises:
            ValueError: less is free where the folder is or will be, or lies there already.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        there = sum(path.stat().st_size for path in self.checkpoints.rglob("*") if path.is_file())
        free = shutil.disk_usage(existing).free
        needed = model_bytes + max(0, checkpoint_bytes - there)
        if free < needed:
            checkpoints = f" ({checkpoint_bytes:,} of them checkpoints: --keep)" if checkpoint_bytes else ""
            raise ValueError(
                f"{self.path}: the model needs {needed:,} bytes{checkpoints} and the disk has {free:,}; make room"
            )


def _is_left_over(path: Path) -> bool:
    """Whether it is a token by which ranks looked whether they share the folder, and which a killed one left there."""
    return path.name.startswith(".shared-")


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name, flush it to disk, rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
