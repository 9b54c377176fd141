"""The disk cache: what is read is what was written, whatever happened to the files in between."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from abyssal.cache import disk, writer
from abyssal.cache.disk import DiskCache
from abyssal.cache.folder import CacheFolder, clear
from abyssal.cache.index import Index
from abyssal.cache.segments import HEADER_BYTES, SegmentWriter
from abyssal.cache.store import PageStore
from tests.support.forked import exit_status, fork
from tests.support.small_disk import mounted_disk

LENGTH = 3000
RECORD = HEADER_BYTES + LENGTH


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def keys_of(numbers: Sequence[int]) -> list[bytes]:
    return [key_of(number) for number in numbers]


def page_of(number: int, length: int = LENGTH) -> np.ndarray:
    """A page's content is a function of its number, so that a wrong one is known wherever it turns up."""
    return np.random.default_rng(number).integers(0, 256, length, dtype=np.uint8)


def put(store: PageStore, numbers: Sequence[int], namespace: str = "") -> None:
    assert store.write(keys_of(numbers), [page_of(number) for number in numbers], namespace) == len(numbers)
    store.flush()


def good(store: PageStore, numbers: Sequence[int]) -> set[int]:
    """Which of the pages are read, each by itself; asserts that they are right."""
    found = set()
    for number in numbers:
        buffer = np.empty(LENGTH, np.uint8)
        if store.read([key_of(number)], [buffer]):
            assert np.array_equal(buffer, page_of(number)), f"page {number} is not what was written"
            found.add(number)
    return found


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def filled(folder: Path) -> Path:
    """Twelve pages in three segments."""
    with DiskCache(folder, 1 << 20, segment_bytes=4 * RECORD) as cache:
        put(cache, range(12))
    assert [path.stat().st_size for path in segments(folder)] == [4 * RECORD] * 3
    return folder


def test_pages_outlive_the_process_that_wrote_them(folder: Path) -> None:
    with DiskCache(folder, 1 << 20) as cache:
        put(cache, range(5))
        assert cache.num_written == 5 and good(cache, range(6)) == set(range(5))
    with DiskCache(folder, 1 << 20) as cache:
        assert cache.lookup(keys_of(range(5))) == 5
        assert cache.lookup(keys_of([0, 1, 99, 2])) == 2 and cache.lookup([]) == 0
        buffers = [bytearray(LENGTH) for _ in range(4)]
        assert cache.read(keys_of([0, 1, 99, 2]), buffers) == 2
        assert bytes(buffers[1]) == page_of(1).tobytes()
        put(cache, range(8))
        assert cache.num_written == 3, "what is there is not written again"
    assert cache.lookup(keys_of([0])) == cache.read(keys_of([0]), buffers) == cache.write(keys_of([9]), [b"9"]) == 0


def test_large_pages_are_read_by_several_threads(folder: Path) -> None:
    length = 300_000
    pages = [page_of(number, length) for number in range(12)]
    with DiskCache(folder, 1 << 26, segment_bytes=1 << 20) as cache:
        assert cache.write(keys_of(range(12)), pages) == 12
        cache.flush()
        buffers = np.empty((12, length), np.uint8)
        assert cache.read(keys_of(range(12)), list(buffers)) == 12
        assert np.array_equal(buffers, pages)


def test_only_the_user_may_read_it(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with DiskCache(folder, 1 << 20) as cache:
        put(cache, [1])
        for path in [folder, *folder.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_page_can_be_read_before_it_is_written_and_the_engine_never_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on, append = threading.Event(), threading.Event(), SegmentWriter.append

    def slow(*arguments):
        begun.set()
        assert may_go_on.wait(10)
        return append(*arguments)

    monkeypatch.setattr(SegmentWriter, "append", slow)
    with DiskCache(folder, 1 << 20, max_pending_bytes=3 * LENGTH) as cache:
        source = page_of(0)
        assert cache.write([key_of(0)], [source]) == 1
        source[:] = 0  # the cache has its own copy
        assert begun.wait(10)
        assert cache.write(keys_of(range(1, 6)), [page_of(number) for number in range(1, 6)]) == 2, "the queue is full"
        assert cache.lookup(keys_of(range(6))) == 3 and good(cache, range(6)) == {0, 1, 2}
        may_go_on.set()
        cache.flush()
        assert good(cache, range(6)) == {0, 1, 2}
        put(cache, [3])
    with DiskCache(folder, 1 << 20) as cache:
        assert good(cache, range(6)) == {0, 1, 2, 3}


def test_a_buffer_of_another_length_is_a_miss(filled: Path) -> None:
    with DiskCache(filled, 1 << 20) as cache:
        for length in (LENGTH - 1, LENGTH + 1):
            assert cache.read([key_of(0)], [bytearray(length)]) == 0


# Damage.


def test_flipped_bytes_are_misses(filled: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    for trial in range(18):
        copy = shutil.copytree(filled, tmp_path / f"{trial}")
        path = generator.choice(segments(copy))
        position = generator.randrange(HEADER_BYTES) if trial % 2 else generator.randrange(4 * RECORD)
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ (1 << generator.randrange(8))]))
        if trial % 3 == 0:
            (copy / "index.sqlite").unlink()  # then the headers alone say what is where
        with DiskCache(copy, 1 << 20) as cache:
            left = good(cache, range(12))
            assert 8 <= len(left) <= 11 if trial % 3 == 0 else len(left) >= 11
            cache.flush()
            missing = sorted(set(range(12)) - left)
            assert not good(cache, missing) and all(cache.lookup([key_of(number)]) == 0 for number in missing)
            put(cache, range(12))
            assert good(cache, range(12)) == set(range(12)), "what was lost is written again"


def test_a_damaged_index_never_gives_a_wrong_page(filled: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    size = (filled / "index.sqlite").stat().st_size
    for trial in range(12):
        copy = shutil.copytree(filled, tmp_path / f"{trial}")
        content = bytearray((filled / "index.sqlite").read_bytes())
        for _ in range(generator.choice([1, 100])):
            content[generator.randrange(size)] ^= 1 << generator.randrange(8)
        (copy / "index.sqlite").write_bytes(content[: size if trial % 5 else generator.randrange(size)])
        with DiskCache(copy, 1 << 20) as cache:
            good(cache, range(12))
            cache.write(keys_of([20]), [page_of(20)])


def test_an_index_that_points_to_another_page_is_a_miss(filled: Path) -> None:
    connection = sqlite3.connect(filled / "index.sqlite")
    with connection:
        connection.execute(f"UPDATE pages SET offset = (offset + {RECORD}) % {4 * RECORD}")
    connection.close()
    with DiskCache(filled, 1 << 20) as cache:
        assert not good(cache, range(12))


@pytest.mark.parametrize("damage", ["gone", "nonsense", "empty"])
def test_a_lost_index_is_made_anew_from_the_segments(filled: Path, damage: str) -> None:
    path = filled / "index.sqlite"
    path.unlink() if damage == "gone" else path.write_bytes(b"nonsense" * 1000 if damage == "nonsense" else b"")
    with DiskCache(filled, 1 << 20) as cache:
        assert good(cache, range(12)) == set(range(12))


@pytest.mark.parametrize("while_open", [True, False])
@pytest.mark.parametrize("size", [0, 10, RECORD, 2 * RECORD + 70])
def test_of_a_segment_cut_short_the_whole_pages_are_left(filled: Path, size: int, while_open: bool) -> None:
    path = segments(filled)[1]
    if not while_open:
        os.truncate(path, size)
    with DiskCache(filled, 1 << 20) as cache:
        if while_open:
            os.truncate(path, size)
        assert good(cache, range(12)) == set(range(4 + size // RECORD)) | set(range(8, 12))


@pytest.mark.parametrize("while_open", [True, False])
def test_a_removed_segment_is_a_miss_and_is_written_again(filled: Path, while_open: bool) -> None:
    path = segments(filled)[0]
    if not while_open:
        path.unlink()
    with DiskCache(filled, 1 << 20) as cache:
        if while_open:
            path.unlink()
        assert good(cache, range(12)) == set(range(4, 12))
        put(cache, range(12))
        assert good(cache, range(12)) == set(range(12))


def test_200_writes_among_kills(folder: Path) -> None:
    """A child that was killed leaves every page that was flushed, whole ones besides, and no others."""
    generator = random.Random(2)
    first, kills = 0, 10

    def write(first: int, pipe: int) -> None:
        cache = DiskCache(folder, 1 << 22, segment_bytes=7 * RECORD)
        for number in range(first, first + 20):
            assert cache.write([key_of(number)], [page_of(number)]) == 1
            if number % 3 == 0:
                cache.flush()
                os.write(pipe, number.to_bytes(4, "little"))
        time.sleep(60)

    for _ in range(kills):
        reader, pipe = os.pipe()
        child = fork(lambda first=first, pipe=pipe: write(first, pipe))
        os.close(pipe)
        flushed = -1
        for _ in range(generator.randrange(1, 7)):
            flushed = int.from_bytes(os.read(reader, 4), "little")
        time.sleep(generator.random() * 2e-3)
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) == -signal.SIGKILL
        os.close(reader)
        with DiskCache(folder, 1 << 22) as cache:
            new = range(first, first + 20)
            assert good(cache, new) >= set(range(first, flushed + 1))
            put(cache, new)
            assert good(cache, new) == set(new)
        first += 20
    with DiskCache(folder, 1 << 22) as cache:
        assert good(cache, range(200)) == set(range(200)), "hits come back"
    assert not [path for path in segments(folder) if path.stat().st_size % RECORD], "no torn tail is left"


def test_a_torn_tail_is_cut_and_whole_pages_before_it_are_indexed(folder: Path) -> None:
    def write() -> None:
        cache = DiskCache(folder, 1 << 20)
        put(cache, range(3))
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork(write)
    assert exit_status(child) == -signal.SIGKILL
    (path,) = segments(folder)
    whole = path.read_bytes()
    other = folder.parent / "other"
    with DiskCache(other, 1 << 20) as cache:
        put(cache, range(3, 5))
    extra = segments(other)[0].read_bytes()
    path.write_bytes(whole + extra[: RECORD + 500])  # page 3 was not indexed yet, page 4 was being written
    (folder / "segments" / ".abandoned.pages").touch()
    with DiskCache(folder, 1 << 20) as cache:
        assert segments(folder) == [path] and path.stat().st_size == 4 * RECORD
        assert good(cache, range(6)) == set(range(4))


# Trouble with the disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_stops_the_writing_with_one_warning(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DiskCache(small_disk / "cache", 1 << 24) as cache:
        for number in range(120):
            cache.write([key_of(number)], [page_of(number)])
            cache.flush()
        assert cache.readable and not cache.writable
        there = good(cache, range(120))
        assert 10 < len(there) < 120 and there == set(range(len(there)))
        assert cache.write([key_of(200)], [page_of(200)]) == 0
    assert len(caplog.records) == 1 and "nothing more is cached on disk" in caplog.text
    caplog.clear()
    with DiskCache(small_disk / "cache", 1 << 24) as cache:
        assert good(cache, range(120)) >= there or not cache.readable
        cache.write([key_of(200)], [page_of(200)])
        cache.flush()
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_write_leaves_the_pages_before_it(
    folder: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writev, calls = os.writev, 0

    def failing(descriptor: int, parts: Sequence[memoryview]) -> int:
        nonlocal calls
        calls += 1
        if calls < 4:
            return writev(descriptor, parts)
        writev(descriptor, [parts[0], parts[1][:100]])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "writev", failing)
    with DiskCache(folder, 1 << 20) as cache:
        cache.write(keys_of(range(6)), [page_of(number) for number in range(6)])
        cache.flush()
        assert good(cache, range(6)) == {0, 1, 2} and not cache.writable
        assert [path.stat().st_size for path in segments(folder)] == [3 * RECORD]
    assert len(caplog.records) == 1 and os.strerror(code) in caplog.text
    monkeypatch.undo()
    with DiskCache(folder, 1 << 20) as cache:
        put(cache, range(6))
        assert good(cache, range(6)) == set(range(6))


def test_a_disk_that_cannot_be_read_turns_it_off_with_one_warning(
    filled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with DiskCache(filled, 1 << 20) as cache:
        monkeypatch.setattr(os, "preadv", failing)
        assert not good(cache, range(12)) and not cache.readable
        assert cache.lookup(keys_of([0])) == 0 and cache.write(keys_of([0]), [page_of(0)]) == 0
    assert len(caplog.records) == 1 and "the disk cache is off" in caplog.text


def test_a_mistake_in_the_writer_fails_no_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "evict", lambda *arguments: 1 // 0)
    with DiskCache(folder, 1 << 20) as cache:
        cache.write(keys_of([0]), [page_of(0)])
        cache.flush()
        assert not good(cache, [0]) and not cache.readable
    assert caplog.records[-1].levelno == logging.WARNING


# Several at once.


def test_processes_share_a_folder(folder: Path) -> None:
    """Two write overlapping pages while two read; nobody sees another page than the one asked for."""

    def write(numbers: Sequence[int]) -> None:
        with DiskCache(folder, 1 << 22, segment_bytes=5 * RECORD) as cache:
            for number in numbers:
                assert cache.write([key_of(number)], [page_of(number)]) == 1
                if number % 4 == 0:
                    cache.flush()

    def read(seed: int) -> None:
        generator = random.Random(seed)
        with DiskCache(folder, 1 << 22) as cache:
            for _ in range(60):
                good(cache, [generator.randrange(60)])

    children = [fork(lambda: write(range(40))), fork(lambda: write(range(20, 60)[::-1]))]
    children += [fork(lambda: read(0)), fork(lambda: read(1))]
    assert [exit_status(child) for child in children] == [0] * 4
    with DiskCache(folder, 1 << 22) as cache:
        assert good(cache, range(60)) == set(range(60))


def test_a_living_engines_segment_is_left_alone(folder: Path) -> None:
    with DiskCache(folder, 1 << 20) as first, DiskCache(folder, 1 << 20) as second:
        put(first, range(3))
        assert good(second, range(3)) == set(range(3))
        with DiskCache(folder, 2 * RECORD, max_age=1e-9):  # would like to remove everything
            assert len(segments(folder)) == 1
        put(first, range(3, 5))
        assert good(second, range(5)) == set(range(5))


# Limits.


def test_the_least_recently_used_segments_go_first(folder: Path) -> None:
    now = 1000.0
    with DiskCache(folder, 12 * RECORD, segment_bytes=2 * RECORD, clock=lambda: now) as cache:
        for number in range(0, 12, 2):
            now += 1
            put(cache, [number, number + 1])
        now += 1
        assert good(cache, [0]) == {0}  # a use of the oldest
        cache.flush()
        for number in range(12, 20, 2):
            now += 1
            put(cache, [number, number + 1])
            assert sum(path.stat().st_size for path in segments(folder)) <= 14 * RECORD
    now += 1
    with DiskCache(folder, 12 * RECORD, clock=lambda: now) as cache:
        left = good(cache, range(20))
        assert {0, 1, 18, 19} <= left and not left & {2, 3, 4, 5}
    with DiskCache(folder, 4 * RECORD, clock=lambda: now) as cache:
        assert len(good(cache, range(20))) <= 4


def test_pages_that_nobody_asked_for_in_a_long_time_go(filled: Path) -> None:
    now: float = time.time() + 1000
    with DiskCache(filled, 1 << 20, max_age=2000, clock=lambda: now) as cache:
        assert good(cache, [5]) == {5}
        cache.flush()
    now += 1500
    with DiskCache(filled, 1 << 20, max_age=2000, clock=lambda: now) as cache:
        assert good(cache, range(12)) == {4, 5, 6, 7}


def test_a_namespace_is_cleared_from_the_files(folder: Path) -> None:
    with DiskCache(folder, 1 << 20, segment_bytes=4 * RECORD) as cache:
        put(cache, range(3), "alice")
        put(cache, range(3, 6), "bob")
        with CacheFolder(folder).index_for_upkeep() as index:  # while the engine runs
            assert clear(CacheFolder(folder), index, "alice") == 3
            assert clear(CacheFolder(folder), index, "nobody") == 0
        assert good(cache, range(6)) == {3, 4, 5}
        content = b"".join(path.read_bytes() for path in segments(folder))
        assert page_of(0).tobytes() not in content and page_of(3).tobytes() in content
        put(cache, range(3), "alice")
    (folder / "index.sqlite").unlink()
    with DiskCache(folder, 1 << 20) as cache:
        assert good(cache, range(6)) == set(range(6)), "what was wiped is passed over"
    with CacheFolder(folder).index_for_upkeep() as index:
        assert clear(CacheFolder(folder), index, None) == 6
    assert not segments(folder)


# Folders that cannot be used.


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for name, problem in [("file", "is not a folder"), ("file/below", "cannot be written"), ("model", "holds files")]:
        with pytest.raises(ValueError, match=problem) as caught:
            DiskCache(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "name another folder" in str(caught.value)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written to"):
        DiskCache(tmp_path / "sealed" / "cache")


@pytest.mark.parametrize("limit", ["max_bytes", "max_age", "max_pending_bytes"])
def test_limits_of_nothing_are_refused(folder: Path, limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} of the disk cache is 0"):
        DiskCache(folder, **{limit: 0})  # pyright: ignore[reportArgumentType]


def test_an_engine_that_hangs_while_it_sets_up_turns_it_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    CacheFolder(folder).prepare()
    monkeypatch.setattr("abyssal.cache.folder.LOCK_SECONDS", 0.05)
    with CacheFolder(folder).locked(), disk.DiskCache(folder) as cache:
        assert not cache.readable and cache.lookup(keys_of([0])) == 0
        cache.flush()
    assert "another process holds" in caplog.text


def test_a_second_connection_to_the_index_leaves_the_locks_of_the_first(tmp_path: Path) -> None:
    """Or another program that closes the index believes to be its last user, and removes the log from under us."""
    path = tmp_path / "index.sqlite"
    with closing(Index(path, 1.0)) as first:
        first.add_segment("a", 0.0)
        Index(path, 1.0).close()
        program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM pages'); c.close()"
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        assert path.with_name(path.name + "-wal").exists()
