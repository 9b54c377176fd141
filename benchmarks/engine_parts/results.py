"""Rows on disk, a file a part; a row is known by its case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """The files ``BENCHMARK-PART.json`` of a folder."""

    def __init__(self, folder: Path, benchmark: str = "engine") -> None:
        self.folder = folder
        self._benchmark = benchmark

    def path(self, part: str, suffix: str = "json") -> Path:
        """Where the rows of a part lie, or its picture."""
        return self.folder / f"{self._benchmark}-{part}.{suffix}"

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Those saved so far."""
        path = self.path(part)
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def has(self, part: str, case: Mapping[str, Any], commit: str) -> bool:
        """Whether a row of this case was measured at this very commit; never of one with changes."""
        return not commit.endswith("+") and any(
            _is_of(row, case) and row["commit"] == commit for row in self.rows(part)
        )

    def add(self, part: str, case: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Save a row in the place of an older one of its case; the file appears whole or not at all."""
        rows = [other for other in self.rows(part) if not _is_of(other, case)]
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path(part).with_suffix(".tmp")
        temporary.write_text(json.dumps({"rows": [*rows, dict(row)]}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path(part))


def _is_of(row: Mapping[str, Any], case: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in case.items())
