"""The disk part's arithmetic, and what it tells of the system's own cache of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine_parts.page_cache import drop, in_memory, read_rate, segment_files


def test_a_file_just_written_is_in_memory_and_can_be_dropped_and_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    assert in_memory(path) in (True, None)
    drop([path])
    assert path.read_bytes() == bytes(3 << 20)
    assert 0 < read_rate([path]) < 1e12


def test_only_segments_that_hold_something_count(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    for name, size in (("b", 5), ("a", 7), ("empty", 0)):
        (tmp_path / "segments" / name).write_bytes(bytes(size))
    (tmp_path / "index.sqlite").write_bytes(bytes(9))
    assert [path.name for path in segment_files(tmp_path)] == ["a", "b"]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        drop([tmp_path / "nothing"])
