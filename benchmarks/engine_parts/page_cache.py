"""The system's cache of files: dropping what it holds of some files, seeing whether it is gone, and reading them.

A disk's rate is that of its files read once they are out of memory.  Where the system does not let go of them (or has
no way to say so), the rate is memory's, and so are the hits: the figures say which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_PIECE = 1 << 20


def segment_files(folder: Path) -> list[Path]:
    """The files of a disk cache that hold pages."""
    return sorted(path for path in (folder / "segments").glob("*") if path.stat().st_size)


def drop(paths: Iterable[Path]) -> None:
    """Write files out and ask the system to forget them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def in_memory(path: Path) -> bool | None:
    """Whether a file's first bytes can be read without waiting for the disk; None where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_rate(paths: Iterable[Path]) -> float:
    """Bytes a second at which files are read from their beginning to their end, a MiB at a time."""
    buffer, total = bytearray(_PIECE), 0
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)
