"""Fixtures of the parallel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.forked_ranks import RankStarter


@pytest.fixture(scope="session")
def rank_starter() -> Iterator[RankStarter]:
    """Starts processes that stand as ranks of one run, and may be killed."""
    with RankStarter() as starter:
        yield starter
