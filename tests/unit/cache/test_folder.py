"""Putting the folder right while other processes use it."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from abyssal.cache import folder as module
from abyssal.cache.disk import DiskCache
from abyssal.cache.folder import CacheFolder, recover
from abyssal.cache.index import Index
from abyssal.cache.segments import SegmentWriter, segment_files


def test_a_segment_that_another_process_has_just_begun_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskCache(tmp_path, 1 << 20).close()
    cache = CacheFolder(tmp_path)
    begun: list[SegmentWriter] = []

    def listed(path: Path) -> dict[str, Path]:
        files = segment_files(path)
        begun.append(SegmentWriter(path))
        with closing(Index(cache.index, 1.0)) as others:
            others.add_segment(begun[-1].name, time.time())
        return files

    monkeypatch.setattr(module, "segment_files", listed)
    with closing(Index(cache.index, 1.0)) as index:
        recover(cache, index, time.time())
        assert [segment.name for segment in index.segments()] == [begun[0].name]
    begun[0].close()
