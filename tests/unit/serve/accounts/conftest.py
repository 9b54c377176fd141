"""A store in a temporary folder, and a clock that a test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from abyssal.serve.accounts.store import Store


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "accounts.sqlite") as store:
        yield store
