"""Telling reservations of a living process from those that a killed one left behind.

A process that reserves holds a lock on a file of its own beside the accounts.  The kernel drops the lock when the
process ends, however it ends, so nothing has to be renewed and no clock has to agree.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path


class Holder:
    """A name that counts as alive until :meth:`close`, or until this process ends."""

    def __init__(self, path: Path) -> None:
        self.name = secrets.token_hex(8)
        self._path = _lock_file(path, self.name)
        self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def is_alive(path: Path, name: str) -> bool:
    """Whether the holder ``name`` of the accounts at ``path`` still is.  A dead one's file is removed."""
    lock_file = _lock_file(path, name)
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        lock_file.unlink(missing_ok=True)
        return False
    finally:
        os.close(descriptor)


def _lock_file(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}-holder-{name}")
