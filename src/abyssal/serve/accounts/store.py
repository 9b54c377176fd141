"""The file in which keys, balances and the log of their changes are kept: sqlite, safe against a kill at any moment.

    accounts      who pays; the balance
    keys          who asks; several may belong to an account
    log           every change of a balance, with the request that caused it; never changed afterwards
    reservations  money set aside for requests that run

A balance is the sum of its account's log, at every moment that another connection can see and after any crash: both are
written in one transaction, which is on the disk before anybody is told of it (write-ahead log, synchronous=FULL).

The file is its owner's alone (mode 0600).  Several processes may have it open; a :class:`Store` is one connection, and
any thread may use it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_APPLICATION = 0x61627975
_FORMAT = 1
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    balance INTEGER NOT NULL DEFAULT 0 CHECK (typeof(balance) = 'integer'),
    postpaid INTEGER NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account INTEGER NOT NULL REFERENCES accounts,
    name TEXT NOT NULL UNIQUE,
    selector BLOB NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    namespace TEXT NOT NULL,
    disabled INTEGER NOT NULL DEFAULT 0,
    expires REAL,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER,
    concurrency INTEGER,
    created REAL NOT NULL
);
CREATE INDEX keys_by_selector ON keys (selector);
CREATE TABLE log (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account INTEGER NOT NULL REFERENCES accounts,
    key INTEGER REFERENCES keys,
    kind TEXT NOT NULL,
    reference TEXT UNIQUE,
    amount INTEGER NOT NULL CHECK (typeof(amount) = 'integer'),
    model TEXT,
    hit_tokens INTEGER NOT NULL DEFAULT 0,
    miss_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    at REAL NOT NULL
);
CREATE INDEX log_by_account ON log (account, at);
CREATE TABLE reservations (
    reference TEXT PRIMARY KEY,
    account INTEGER NOT NULL REFERENCES accounts,
    amount INTEGER NOT NULL,
    holder TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX reservations_by_account ON reservations (account, amount);
"""
_TIMEOUT_SECONDS = 30.0


def default_path() -> Path:
    """``$XDG_DATA_HOME/abyssal/accounts.sqlite``, in ``~/.local/share`` where that is not set."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "abyssal" / "accounts.sqlite"


class Store:
    """A connection to the accounts at ``path``, which are made if they are not there.

    Args:
        currency: of a new file; of one that exists it is what that file says.

    Raises:
        ValueError: the file is not one of accounts, is damaged, is another user's, or is of another format.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, currency: str = "USD") -> None:
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(path)
        self._connection = sqlite3.connect(
            path, timeout=_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._set_up(currency)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: cannot be read as accounts ({error}); name another file") from None
        except BaseException:
            self._connection.close()
            raise

    def _set_up(self, currency: str) -> None:
        self._connection.row_factory = sqlite3.Row
        self._check_ours()
        self._write_ahead()
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        with self.transaction():
            if self.value("SELECT count(*) FROM sqlite_master") == 0:
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
                self.write("INSERT INTO settings VALUES ('currency', ?)", currency)
        self._check_ours()  # another program may have been faster
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o600)
        self.currency = str(self.value("SELECT value FROM settings WHERE name = 'currency'"))

    def _check_ours(self) -> None:
        """Before anything is changed: a file without tables is ours to fill."""
        if self.value("SELECT count(*) FROM sqlite_master") == 0:
            return
        if self.value("PRAGMA application_id") != _APPLICATION:
            raise ValueError(f"{self.path}: holds something else than accounts; name another file")
        if self.value("PRAGMA user_version") != _FORMAT:
            raise ValueError(f"{self.path}: is of format {self.value('PRAGMA user_version')}, this is for {_FORMAT}")

    def _write_ahead(self) -> None:
        """sqlite does not always wait for others when it changes the mode of a new file."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """Everything inside happens, or nothing does; no other writer comes in between.

        Args:
            durable: wait until it is on the disk.  What a crash makes void anyway need not.
        """
        with self._lock:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        with self._lock:
            return self._connection.execute(query, values).fetchone()

    def value(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self.row(query, *values)
        return None if row is None else row[0]

    def write(self, statement: str, *values: Any) -> int:
        """Run it, inside a transaction; how many rows it changed."""
        assert self._connection.in_transaction, "writing happens inside a transaction"
        return self._connection.execute(statement, values).rowcount

    def insert(self, table: str, columns: Sequence[str], *values: Any) -> int:
        """The new row's id."""
        assert self._connection.in_transaction, "writing happens inside a transaction"
        names, places = ", ".join(columns), ", ".join("?" * len(columns))
        cursor = self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", values)
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def _make_private(path: Path) -> None:
    """Make the file, unless it is there; sqlite gives the files beside it the same mode.

    A file that is there is not opened: closing it would drop the locks of this process's other connections to it.

    Raises:
        ValueError: it belongs to somebody else, who could change what others owe.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if os.geteuid() not in (0, path.stat().st_uid):
            raise ValueError(f"{path}: belongs to another user; name another file") from None
