"""How far a conversion has come: lines appended to a file, each after the data that it vouches for is on disk.

The first line says what is being done (source files with sizes and times, format, shards).  A later run with the same
first line goes on from the last whole line; one with another is refused, so that two conversions never mix.  A lock
keeps a second process from working on the same folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Position:
    """Everything before this is on disk."""

    shard: int
    tensor: int
    """Index in the shard."""
    row: int
    """The next row to write of that tensor."""


class Journal:
    """The open journal of one conversion.

    Args:
        path: the file; made if absent.
        task: what is being done, as JSON values.

    Raises:
        ValueError: the file belongs to another task, or another process holds it.
    """

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self.position = self._resume(json.dumps(task, sort_keys=True))
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path.parent}: another conversion is at work there; wait for it to end") from None

    def _resume(self, task: str) -> Position:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole, _, torn = text.rpartition("\n")
        first, *lines = whole.split("\n")
        if not whole:  # nothing was vouched for, not even the task
            os.ftruncate(self._descriptor, 0)
            self._append(task)
            return Position(0, 0, 0)
        if first != task:
            raise ValueError(
                f"{self.path.parent}: holds an unfinished conversion of other files or with other options; finish that "
                "one with its options, or delete the folder"
            )
        if torn:
            os.ftruncate(self._descriptor, len(whole.encode("utf-8")) + 1)
        return Position(*json.loads(lines[-1])) if lines else Position(0, 0, 0)

    def record(self, position: Position) -> None:
        """Append a line; the data before ``position`` must be on disk already."""
        self._append(json.dumps([position.shard, position.tensor, position.row]))

    def _append(self, line: str) -> None:
        os.write(self._descriptor, line.encode("utf-8") + b"\n")
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
