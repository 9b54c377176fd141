"""The file of accounts."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.store import Store, default_path


def test_every_file_is_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "new" / "accounts.sqlite"
        with Store(path) as store:
            KeyRing(store).create("alice")
            files = list(path.parent.iterdir())
            assert len(files) == 3  # the log written ahead, and its index
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        Store(path).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_what_is_committed_waits_for_the_disk(tmp_path: Path) -> None:
    with Store(tmp_path / "a") as store:
        assert store.value("PRAGMA journal_mode") == "wal"
        for durable in (True, False, True):
            with store.transaction(durable=durable):
                assert store.value("PRAGMA synchronous") == (2 if durable else 1)


def test_all_or_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.transaction():
        store.write("INSERT INTO settings VALUES ('a', 'b')")
        raise RuntimeError
    assert store.value("SELECT count(*) FROM settings") == 1
    with pytest.raises(AssertionError):
        store.write("INSERT INTO settings VALUES ('a', 'b')")


def test_a_sum_never_turns_into_a_float(store: Store) -> None:
    KeyRing(store).create("alice")
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.write("UPDATE accounts SET balance = 9223372036854775807")
        store.write("UPDATE accounts SET balance = balance + 1")
    assert store.value("SELECT balance FROM accounts") == 0


def test_currency_is_the_files(tmp_path: Path) -> None:
    with Store(tmp_path / "a", "CNY") as store:
        assert store.currency == "CNY"
    with Store(tmp_path / "a", "USD") as store:
        assert store.currency == "CNY"


@pytest.mark.parametrize("content", [b"not a database" * 100, None])
def test_other_files_are_left_alone(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "other"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE mine (x)")
        other.close()
    else:
        path.write_bytes(content)
    path.chmod(0o644)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=str(path)):
        Store(path)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (before, 0o644)
    assert list(tmp_path.iterdir()) == [path]


def test_another_format_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "a") as store:
        store.rows("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="format 9"):
        Store(tmp_path / "a")


def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def open_one(number: int) -> str:
        ready.wait()
        with Store(tmp_path / "a") as store:
            return KeyRing(store).create(f"key {number}")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(open_one, range(8)))) == 8
    with Store(tmp_path / "a") as store:
        assert len(KeyRing(store).all()) == 8


def test_a_second_connection_leaves_the_locks_of_the_first(store: Store) -> None:
    """Or another program that closes the file believes to be its last user, and removes the log from under us."""
    KeyRing(store).create("alice")
    Store(store.path).close()
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM keys'); c.close()"
    subprocess.run([sys.executable, "-c", program, str(store.path)], check=True)
    assert store.path.with_name(store.path.name + "-wal").exists()


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "abyssal" / "accounts.sqlite"


def test_it_is_free_of_torch() -> None:
    program = (
        "import sys, abyssal.serve.accounts.desk; sys.exit(bool({'torch', 'numpy', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
