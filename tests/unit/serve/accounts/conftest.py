"""A store in a temporary folder, and a clock that a test turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class HastyStore(Store):
    """One that waits for no disk, which may be busy: a test that cuts no power cannot tell."""

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        with super().transaction(durable=False):
            yield


@pytest.fixture(scope="session")
def open_store() -> Callable[[Path], Store]:
    return HastyStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with HastyStore(tmp_path / "accounts.sqlite") as store:
        yield store
