"""Fixtures that every test may use; what they are made of is in ``tests/support``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """``workers(world_size)(function, *args)``: run a top-level function on ranks joined over gloo.

    The processes start when first used and serve every later test; see :class:`WorkerPool`.
    """
    pool = WorkerPool()
    yield pool
    pool.close()
