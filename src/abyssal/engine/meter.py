"""How an engine stands, and what it has done since it began: :class:`~abyssal.engine.wire.Statistics`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from abyssal.cache.folder import CacheFolder
from abyssal.cache.segments import segment_files
from abyssal.engine.core import Engine
from abyssal.engine.wire import Statistics

DISK_SECONDS = 10.0
"""Between two looks at the disk cache."""

logger = logging.getLogger(__name__)


class EngineMeter:
    """Puts the engine's books together, and counts what they do not say.

    Args:
        disk: the folder of the disk cache; None: there is none.
    """

    def __init__(self, engine: Engine, disk: CacheFolder | None = None) -> None:
        self._engine = engine
        self._disk = None if disk is None else FolderSize(disk)
        self._steps = 0
        self._seconds = 0.0

    def note_step(self, seconds: float) -> None:
        """A step has ended, well or not."""
        self._steps += 1
        self._seconds += seconds

    def statistics(self) -> Statistics:
        """As of now."""
        scheduler, drafts = self._engine.scheduler, self._engine.draft_statistics
        totals = scheduler.totals
        return Statistics(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            used_pages=self._engine.pool.used,
            total_pages=self._engine.pool.num_pages,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            step_seconds=self._seconds,
            prompt_tokens=totals.prompt_tokens,
            memory_hit_tokens=totals.memory_hit_tokens,
            disk_hit_tokens=totals.disk_hit_tokens,
            output_tokens=totals.output_tokens,
            drafted=drafts.drafted,
            accepted=drafts.accepted,
            expert_loads=self._engine.expert_loads,
            disk_bytes=0 if self._disk is None else self._disk.bytes,
        )


class FolderSize:
    """Bytes of a disk cache, looked at now and then by a thread of its own: a disk may take its time.

    Args:
        clock: seconds.
    """

    def __init__(self, folder: CacheFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._bytes = 0
        self._looked_at = float("-inf")
        self._thread: threading.Thread | None = None

    @property
    def bytes(self) -> int:
        """As last looked at; 0 before."""
        looking = self._thread is not None and self._thread.is_alive()
        if not looking and self._clock() - self._looked_at >= DISK_SECONDS:
            self._looked_at = self._clock()
            self._thread = threading.Thread(target=self._look, name="disk-watcher", daemon=True)
            self._thread.start()
        return self._bytes

    def _look(self) -> None:
        try:
            self._bytes = sum(path.stat().st_size for path in segment_files(self._folder.segments).values())
        except OSError as error:  # a segment was evicted under way, or the disk is gone: next time
            logger.debug("the disk cache could not be looked at: %s", error)
