"""The life of the engine's process: started, watched, started again when it has died, and given up at last.

The first restart comes at once, further ones after ever longer pauses.  A process that is silent for too long while
requests are in it is killed: a step that hangs helps nobody.  One that never was ready is not started again, since
whatever was wrong (a folder, an option, memory) is wrong still; and one that dies again and again soon after it was
ready is given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from abyssal.engine.wire import Failed, Ready, Report
from abyssal.serve.engine.process import EngineProcess
from abyssal.serve.service import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supervision:
    """When the engine's process is ended, and when it is started again.  Seconds."""

    silence: float = 60.0
    """So long it may say nothing while requests are under way, before it is taken to hang."""
    quick: float = 60.0
    """Dying sooner after it was ready, or before, is a quick failure."""
    most_quick: int = 5
    """So many quick failures in a row, and it is given up."""
    first_pause: float = 0.5
    """Before the second restart in a row; each further one waits twice as long."""
    longest_pause: float = 30.0
    stop: float = 20.0
    """So long it may take to write what is to be kept."""

    def pause(self, quick: int) -> float:
        """Before a restart, after so many quick failures in a row."""
        return min(self.first_pause * 2.0 ** (quick - 2), self.longest_pause) if quick >= 2 else 0.0


class Supervisor:
    """Keeps a process alive.

    Args:
        spawn: starts one.
        hear: takes each of its reports but ``Failed``; those of a later process are of another engine.
        lost: is told that a process has ended, when :attr:`state` says what comes next.
        busy: whether requests are under way.
    """

    def __init__(
        self,
        supervision: Supervision,
        spawn: Callable[[], Awaitable[EngineProcess]],
        hear: Callable[[Report], None],
        lost: Callable[[], None],
        busy: Callable[[], bool],
    ) -> None:
        self._supervision = supervision
        self._spawn, self._hear, self._lost, self._busy = spawn, hear, lost, busy
        self.state = State.STARTING
        self.problem = ""
        """Why the engine does not run, where it does not."""
        self.restarts = 0
        """How often the process was started again."""
        self.stopping = False
        self.process: EngineProcess | None = None
        """None while there is none."""
        self._ready_at: float | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        self._task = asyncio.create_task(self._live(), name="engine-supervisor")

    async def ready(self) -> None:
        """Wait until the process is ready.

        Raises:
            ValueError: it was given up: what is wrong, in one sentence.
        """
        while self.state is not State.READY:
            if self.state is State.FAILED:
                raise ValueError(self.problem)
            self._changed.clear()
            await self._changed.wait()

    async def stop(self) -> None:
        """End the process, once what is to be kept is on disk."""
        self.stopping = True
        if self.process is not None:
            await self.process.stop(self._supervision.stop, loaded=self.state is State.READY)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._become(State.FAILED, "the server was stopped")

    async def _live(self) -> None:
        try:
            await self._keep_alive()
        except Exception as error:  # ours; nobody may wait for an engine that nobody looks after
            logger.exception("the engine is given up: its supervisor failed")
            self._become(State.FAILED, f"its supervisor failed: {type(error).__name__} {error}")
            self._lost()

    async def _keep_alive(self) -> None:
        quick = 0
        while True:
            problem = await self._live_once()
            if self.stopping:
                return
            lived = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
            quick = quick + 1 if lived < self._supervision.quick else 0
            if self.state is State.STARTING or quick >= self._supervision.most_quick:
                logger.error("the engine is given up: %s", problem)
                self._become(State.FAILED, problem)
                self._lost()
                return
            self._become(State.RESTARTING, problem)
            self._lost()
            pause = self._supervision.pause(quick)
            logger.error("%s; it is started again in %.1f s", problem, pause)
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _live_once(self) -> str:
        """Start the process and wait for its end: why it came."""
        failed = ""

        def handle(report: Report) -> None:
            nonlocal failed
            if isinstance(report, Failed):
                failed = report.message
                return
            self._hear(report)
            if isinstance(report, Ready):
                self._ready_at = time.monotonic()
                self._become(State.READY)

        self._ready_at = None
        try:
            self.process = process = await self._spawn()
        except (OSError, ValueError) as error:
            return f"the engine's process cannot be started: {error}"
        watchdog = asyncio.create_task(self._watch(process), name="engine-watchdog")
        try:
            status = await process.listen(handle)
        finally:
            watchdog.cancel()
            self.process = None
        return failed or _description(status, process.last_lines)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a process that hangs."""
        silence = self._supervision.silence
        while True:
            await asyncio.sleep(min(1.0, silence / 4))
            silent = time.monotonic() - process.heard_at
            if self.state is State.READY and self._busy() and silent > silence:
                logger.error("the engine said nothing for %.0f s while requests were under way; it is killed", silent)
                process.kill()

    def _become(self, state: State, problem: str = "") -> None:
        self.state, self.problem = state, problem
        self._changed.set()


def _description(status: int, last_lines: Sequence[str]) -> str:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    told = next((line for line in reversed(last_lines) if line.strip()), "")
    return f"the engine's process {how}" + (f" ({told.strip()})" if told else "")
