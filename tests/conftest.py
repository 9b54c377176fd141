"""Fixtures that every test may use; what they are made of is in ``tests/support``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports torch.  The tests' models are too small to gain from a second thread, and threads that wait
# for one another lose many times over when something else wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.support.worker_pool import WorkerPool

if TYPE_CHECKING:
    from tests.support.trained_model import TrainedModel

# Nothing that a test starts, here or in a process of its own, finds the user's context cache, or writes there; what
# other programs keep beside it (fonts, compilers' outputs) stays where it is.
_USERS_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_OWN_CACHE = tempfile.TemporaryDirectory(prefix="abyssal-tests-")
for _path in _USERS_CACHE.iterdir() if _USERS_CACHE.is_dir() else ():
    if _path.name != "abyssal":
        (Path(_OWN_CACHE.name) / _path.name).symlink_to(_path)
os.environ["XDG_CACHE_HOME"] = _OWN_CACHE.name


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """``workers(world_size)(function, *args)``: run a top-level function on ranks joined over gloo.

    The processes start when first used and serve every later test; see :class:`WorkerPool`.
    """
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A small model trained on text, in memory and as a folder; about ten seconds, once.  Do not change it."""
    from tests.support.trained_model import train_small_model  # torch, for the tests that want it alone

    return train_small_model(tmp_path_factory.mktemp("trained") / "run")
