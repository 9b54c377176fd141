"""A run's folder: names inside it, and files that appear whole or not at all.  Free of torch.

    RUN/run.json          resolved configuration and environment
    RUN/metrics.jsonl     one line a step and a validation
    RUN/model/            a Hugging Face folder with its tokenizer; there once training is done, and then whole

A run that is interrupted leaves the first two and no model.
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
    def model(self) -> Path:
        return self.path / "model"

    def check_free(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ValueError: it exists and is not empty, or is no folder.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path}: exists and is not an empty folder; give another --out, or remove it first")

    def check_room(self, num_bytes: int) -> None:
        """Refuse a disk without room for the model, before it is trained.

        Raises:
            ValueError: fewer than ``num_bytes`` are free where the folder is or will be.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            raise ValueError(f"{self.path}: the model needs {num_bytes:,} bytes and the disk has {free:,}; make room")


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
