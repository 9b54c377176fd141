"""The folder of the disk cache: setting it up, putting it right after a crash, and keeping it within its limits.

    FOLDER/index.sqlite    which page lies where
    FOLDER/segments/       the pages
    FOLDER/digests.json    digests of models' files
    FOLDER/lock            held while a process sets the folder up

The folder and what is in it are the user's alone (mode 0700).  Any number of processes use it at once: each appends to
segments of its own, and whoever finds the cache too large removes whole segments that no living process appends to.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from abyssal.cache.index import Index, Segment
from abyssal.cache.segments import REMOVED, abandoned_files, scan, segment_files, take, wipe

LOCK_SECONDS = 30.0
"""How long to wait for another process that is setting the folder up, or writing to the index."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/abyssal/pages``, in ``~/.cache`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abyssal" / "pages"


def label_of(namespace: str) -> bytes:
    """What files say of whose a page is: a digest, since names of users may be secrets."""
    return blake2b(namespace.encode(), digest_size=8, person=b"abyssal-label").digest()


@dataclass(frozen=True)
class CacheFolder:
    """Paths of a disk cache."""

    root: Path

    @property
    def index(self) -> Path:
        return self.root / "index.sqlite"

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def digests(self) -> Path:
        """What is remembered of models' files (:class:`~abyssal.cache.key.FileDigests`).  In here, where nobody else
        can write: a false digest would let one model's pages pass for another's."""
        return self.root / "digests.json"

    def exists(self) -> bool:
        return self.index.exists()

    def prepare(self) -> None:
        """Make the folder, or make sure that it is one.

        Raises:
            ValueError: it is not a folder, holds other things, belongs to somebody else, or cannot be written to.
        """
        advice = "name another folder for the cache, or turn it off"
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.root.iterdir()) and not self.lock.exists():
                raise ValueError(f"{self.root}: holds files that are not a cache's; {advice}")
            if os.geteuid() not in (0, self.root.stat().st_uid):
                raise ValueError(f"{self.root}: belongs to another user, who could change the pages; {advice}")
            self.root.chmod(0o700)
            self.lock.touch(mode=0o600)
            self.segments.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"{self.root}: is not a folder; {advice}") from None
        except (PermissionError, NotADirectoryError) as error:
            raise ValueError(f"{self.root}: cannot be written to ({error.strerror}); {advice}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time.

        Raises:
            TimeoutError: another one is in here for longer than LOCK_SECONDS.
        """
        with self.lock.open("w") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"another process holds {self.lock}") from None
                    time.sleep(0.01)
            yield

    def open_index(self) -> Index:
        """The index; one that is damaged is made anew, from what :func:`recover` finds.  Call it locked."""
        for damaged in (False, True):
            if damaged:
                for suffix in ("", "-wal", "-shm"):
                    self.index.with_name(self.index.name + suffix).unlink(missing_ok=True)
            try:
                index = Index(self.index, LOCK_SECONDS)
                try:
                    index.verify()
                except BaseException:
                    index.close()
                    raise
                return index
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                if damaged:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def index_for_upkeep(self) -> Iterator[Index]:
        """The index, while no process sets the folder up, which is done once more: it tells the truth then.

        Raises:
            OSError: the folder cannot be used.
        """
        try:
            self.prepare()
            with self.locked(), closing(self.open_index()) as index:
                recover(self, index, time.time())
                yield index
        except sqlite3.Error as error:
            raise OSError(f"{self.root}: {error}") from error


def recover(folder: CacheFolder, index: Index, now: float) -> None:
    """Make the index and the segments agree after processes were killed or files were removed."""
    known = {segment.name: segment for segment in index.segments()}
    files = segment_files(folder.segments)  # afterwards: others begin segments meanwhile, the file first
    for name in known.keys() - files.keys():
        index.remove_segment(known[name].id)
    for name, path in files.items():
        segment = known.get(name)
        if segment is None or not segment.sealed:
            _recover_segment(path, segment, index, now)
    for path in abandoned_files(folder.segments):
        descriptor = take(path)
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _recover_segment(path: Path, segment: Segment | None, index: Index, now: float) -> None:
    """Index what a killed process appended, and cut off the record it did not finish."""
    descriptor = take(path)
    if descriptor is None:  # its process lives
        return
    try:
        start = 0 if segment is None else segment.num_bytes
        records = list(scan(descriptor, start))
        end = records[-1].end if records else start
        if end == 0:
            path.unlink(missing_ok=True)
            if segment is not None:
                index.remove_segment(segment.id)
            return
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
        number = index.add_segment(path.name, now) if segment is None else segment.id
        used = os.fstat(descriptor).st_mtime
        index.add_pages(number, [record for record in records if record.key != REMOVED], end, min(used, now))
        index.seal(number)
    finally:
        os.close(descriptor)


def evict(folder: CacheFolder, index: Index, max_bytes: int, max_age: float, now: float, room: int = 0) -> int:
    """Remove segments that were last used longer ago than ``max_age`` seconds, then the least recently used ones until
    all fit into ``max_bytes`` with ``room`` to spare.

    Returns:
        Bytes that are left.
    """
    segments = index.segments()
    total = sum(segment.num_bytes for segment in segments)
    for segment in segments:
        if segment.used >= now - max_age and total + room <= max_bytes:
            continue
        if remove_segment(folder, index, segment):
            total -= segment.num_bytes
    return total


def remove_segment(folder: CacheFolder, index: Index, segment: Segment) -> bool:
    """Remove a segment unless a living process appends to it."""
    path = folder.segments / segment.name
    descriptor = take(path)
    if descriptor is None and path.exists():
        return False
    index.remove_segment(segment.id)
    path.unlink(missing_ok=True)
    if descriptor is not None:
        os.close(descriptor)
    return True


def clear(folder: CacheFolder, index: Index, namespace: str | None) -> int:
    """Remove the pages of a namespace, or all: their bytes from the files, and not only what the index says of them.

    Pages that a running engine has not written yet may follow.

    Returns:
        Pages removed.
    """
    label = None if namespace is None else label_of(namespace)
    known = {segment.name: segment for segment in index.segments()}
    count = 0
    for name, path in segment_files(folder.segments).items():
        if name in known:
            count += _clear_segment(folder, index, known[name], path, label)
    return count


def _clear_segment(folder: CacheFolder, index: Index, segment: Segment, path: Path, label: bytes | None) -> int:
    with path.open("r+b", buffering=0) as file:
        records = list(scan(file.fileno(), 0))
        damaged = (records[-1].end if records else 0) < segment.num_bytes
        records = [record for record in records if record.key != REMOVED]
        doomed = [record for record in records if label in (None, record.label)]
        if not (damaged or doomed):
            return 0
        if (damaged or len(doomed) == len(records)) and remove_segment(folder, index, segment):
            return len(doomed)
        for record in doomed:
            wipe(file.fileno(), record)
    index.forget(segment.id, doomed)
    return len(doomed)
