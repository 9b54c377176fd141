"""How an engine stands, and what it has done since it began: :class:`~abyssal.engine.wire.Statistics`."""

from __future__ import annotations

from abyssal.engine.core import Engine
from abyssal.engine.wire import Statistics


class EngineMeter:
    """Counts what the engine's own books do not say."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = 0
        self._seconds = 0.0

    def note_step(self, seconds: float) -> None:
        """A step has ended, well or not."""
        self._steps += 1
        self._seconds += seconds

    def statistics(self) -> Statistics:
        """As of now."""
        scheduler, drafts = self._engine.scheduler, self._engine.draft_statistics
        pool = scheduler._memory.pool
        return Statistics(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            used_pages=pool.num_pages - pool.free - pool.idle,
            total_pages=pool.num_pages,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            step_seconds=self._seconds,
            drafted=drafts.drafted,
            accepted=drafts.accepted,
        )
