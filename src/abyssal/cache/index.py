"""The index of a folder of segments: which page lies where, in sqlite.

It is written ahead (WAL), so that several processes may read while one writes, and a killed process leaves it whole.
Losing it loses nothing: the segments' headers say the same (:func:`abyssal.cache.folder.recover`).  Entries are trusted
for where to look and not for what is found there.  So nothing waits for the disk here either: what a power failure
leaves is checked at the next start, and made anew if need be.

An :class:`Index` is one connection, for one thread at a time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from abyssal.cache.segments import Record

_APPLICATION = 0x61627973
_FORMAT = 1
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL,
    used REAL NOT NULL,
    sealed INTEGER NOT NULL
);
CREATE TABLE pages (
    key BLOB PRIMARY KEY,
    label BLOB NOT NULL,
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX pages_by_segment ON pages (segment);
"""


@dataclass(frozen=True)
class Segment:
    """A segment as the index knows it."""

    id: int
    name: str
    num_bytes: int
    """Up to the end of the last page that is indexed."""
    used: float
    """When a page of it was last read or written, in seconds since the epoch."""
    sealed: bool
    """Its writer closed it."""


@dataclass(frozen=True)
class Location:
    """Where a page lies."""

    segment: int
    name: str
    record: Record


def _make(path: Path) -> None:
    """Make the file, the user's alone, if it is not there.  One that is there is not opened: to close it would drop
    the locks of this process's other connections to it."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


class Index:
    """A connection to the index at ``path``, which is made if it is not there.

    Args:
        timeout: seconds to wait for another process that is writing.

    Raises:
        sqlite3.Error: the file is not an index, is damaged, or is of another format.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        _make(path)
        self._connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = OFF")
            self._set_up(path)
        except BaseException:
            self._connection.close()
            raise

    def _set_up(self, path: Path) -> None:
        with self._transaction():
            if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
        pragmas = [
            self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        ]
        if pragmas != [_APPLICATION, _FORMAT]:
            raise sqlite3.DatabaseError(f"{path} is not an index of this format")

    def verify(self) -> None:
        """Raises sqlite3.DatabaseError: the file is damaged where sqlite can tell."""
        problem = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # Reading.

    def contains(self, key: bytes) -> bool:
        return self._connection.execute("SELECT 1 FROM pages WHERE key = ?", (key,)).fetchone() is not None

    def locate(self, key: bytes) -> Location | None:
        query = "SELECT segment, name, label, offset, length FROM pages JOIN segments ON id = segment WHERE key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        segment, name, label, offset, length = row
        return Location(segment, name, Record(key, label, offset, length))

    def segments(self) -> list[Segment]:
        """All of them, least recently used first."""
        rows = self._connection.execute("SELECT id, name, bytes, used, sealed FROM segments ORDER BY used, id")
        return [Segment(number, name, size, used, bool(sealed)) for number, name, size, used, sealed in rows]

    def records(self, segment: int) -> list[Record]:
        """The pages of a segment in the order of the file."""
        rows = self._connection.execute(
            "SELECT key, label, offset, length FROM pages WHERE segment = ? ORDER BY offset", (segment,)
        )
        return [Record(*row) for row in rows]

    def sizes(self) -> dict[bytes, tuple[int, int]]:
        """Pages and their bytes by the label of the namespace."""
        rows = self._connection.execute("SELECT label, count(*), sum(length) FROM pages GROUP BY label")
        return {label: (count, size) for label, count, size in rows}

    # Writing.

    def add_segment(self, name: str, used: float) -> int:
        cursor = self._connection.execute(
            "INSERT INTO segments (name, bytes, used, sealed) VALUES (?, 0, ?, 0)", (name, used)
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add_pages(self, segment: int, records: Iterable[Record], num_bytes: int, used: float) -> None:
        """Pages appended to a segment, which ends at ``num_bytes`` now.  A key that is known keeps its place."""
        rows = [(record.key, record.label, segment, record.offset, record.length) for record in records]
        with self._transaction():
            self._connection.executemany("INSERT OR IGNORE INTO pages VALUES (?, ?, ?, ?, ?)", rows)
            self._connection.execute(
                "UPDATE segments SET bytes = ?, used = max(used, ?) WHERE id = ?", (num_bytes, used, segment)
            )

    def seal(self, segment: int) -> None:
        self._connection.execute("UPDATE segments SET sealed = 1 WHERE id = ?", (segment,))

    def touch(self, segments: Iterable[int], used: float) -> None:
        with self._transaction():
            self._connection.executemany(
                "UPDATE segments SET used = max(used, ?) WHERE id = ?", [(used, segment) for segment in segments]
            )

    def forget(self, segment: int, records: Iterable[Record]) -> None:
        """Pages that are not where they should be."""
        rows = [(record.key, segment, record.offset) for record in records]
        with self._transaction():
            self._connection.executemany("DELETE FROM pages WHERE key = ? AND segment = ? AND offset = ?", rows)

    def remove_segment(self, segment: int) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM pages WHERE segment = ?", (segment,))
            self._connection.execute("DELETE FROM segments WHERE id = ?", (segment,))
