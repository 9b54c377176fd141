"""The model's own engine as a :class:`~abyssal.serve.service.Service`: its process, kept alive, and the requests in it.

    service = await EngineService.start(folder, "my-model", {"num_drafts": "auto"})   # returns at once
    await service.ready()                                                             # or raises what is wrong
    async for event in service.run(prepared, origin): ...
    await service.stop()

A process that dies is started again, at once the first time and then after ever longer pauses; every request that was
in it ends with a 503 in the same moment.  So does a process that is silent for too long while requests are in it: a
step that hangs helps nobody.  One that dies again and again soon after it was ready is given up.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.engine.messages import Request
from abyssal.engine.wire import Add, Cancel, Delta, Failed, News, Ready, Record, Recorded, Report, Statistics
from abyssal.serve.engine.mailbox import Mailbox
from abyssal.serve.engine.process import EngineProcess
from abyssal.serve.engine.served import FolderText
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol.errors import ApiError, of_value_error
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.service import Origin, State

MOST_STEPS = 10_000
"""Of a trace."""
MOST_SECONDS = 300.0

_UNAVAILABLE = {
    State.STARTING: "The model is being loaded; try again in a moment",
    State.READY: "The engine's process ended; try again in a moment",
    State.RESTARTING: "The engine failed and is being started again; try again in a moment",
    State.FAILED: "The engine cannot run; the server's log says why",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supervision:
    """When the engine's process is ended, and when it is started again.  Seconds."""

    silence: float = 60.0
    """So long it may say nothing while requests are under way, before it is taken to hang."""
    quick: float = 60.0
    """Dying sooner after it was started is a quick failure."""
    most_quick: int = 5
    """So many quick failures in a row, and it is given up."""
    first_pause: float = 0.5
    """Before the second restart in a row; each further one waits twice as long."""
    longest_pause: float = 30.0
    stop: float = 20.0
    """So long it may take to write what is to be kept."""


@dataclass(eq=False)
class _Run:
    """One answer under way."""

    mailbox: Mailbox
    request_ids: dict[int, int] = field(default_factory=dict)
    """Engine requests that have not ended, and which prompt each is of."""
    choices_left: dict[int, int] = field(default_factory=dict)
    """Of each such request."""


class EngineService:
    """Requests of one model to one engine's process.  Make it by :meth:`start`."""

    def __init__(self, folder: Path, name: str, engine_options: Mapping[str, Any], supervision: Supervision) -> None:
        self.folder = folder
        self.name = name
        self._options = dict(engine_options)
        self._supervision = supervision
        self._state = State.STARTING
        self._statistics = Statistics()
        self.restarts = 0
        """How often the process was started again."""
        self.expert_layers: tuple[int, ...] = ()
        """Numbers of the layers with experts, once the model was loaded: the rows of ``statistics.expert_loads``."""
        self._served: ServedModel | None = None
        self._text: FolderText | None = None
        self._process: EngineProcess | None = None
        self._numbers = itertools.count()
        self._runs: dict[int, _Run] = {}
        self._recording: asyncio.Future[bytes] | None = None
        self._problem = ""
        self._stopping = False
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        folder: Path,
        name: str,
        engine_options: Mapping[str, Any] | None = None,
        supervision: Supervision | None = None,
    ) -> EngineService:
        """Start the engine's process, and return while it loads the model: :meth:`ready` waits for it.

        Args:
            folder: of the model.
            name: by which requests call it.
            engine_options: fields of ``EngineConfig``, and ``dtype``.

        Raises:
            ValueError, OSError: the folder's tokenizer or chat template cannot be used.
        """
        service = cls(Path(folder), name, engine_options or {}, supervision or Supervision())
        service._text = await asyncio.to_thread(FolderText.of, service.folder)
        service._supervisor = asyncio.create_task(service._supervise(), name="engine-supervisor")
        return service

    async def ready(self) -> ServedModel:
        """Wait until the model is loaded, for the first time or again.

        Raises:
            ValueError: it cannot be: what is wrong, in one sentence.
        """
        while self._state is not State.READY:
            if self._state is State.FAILED:
                raise ValueError(self._problem)
            self._changed.clear()
            await self._changed.wait()
        return self.served

    @property
    def state(self) -> State:
        return self._state

    @property
    def problem(self) -> str:
        """Why the engine does not run, where it does not."""
        return self._problem

    @property
    def statistics(self) -> Statistics:
        return self._statistics

    @property
    def served(self) -> ServedModel:
        """The model, once it was loaded.

        Raises:
            ApiError: 503, before.
        """
        if self._served is None:
            raise self._unavailable()
        return self._served

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return None if self._process is None else self._process.pid

    @property
    def num_running(self) -> int:
        """Engine requests that have not ended."""
        return len(self._runs)

    async def run(self, prepared: Prepared, origin: Origin) -> AsyncGenerator[EngineEvent, None]:
        process = self._ready_process()
        run = _Run(Mailbox(prepared.num_choices))
        try:
            for index, prompt in enumerate(prepared.prompts):
                request_id = next(self._numbers)
                request = Request(
                    request_id,
                    tuple(prompt),
                    prepared.params,
                    user=origin.user,
                    namespace=origin.namespace,
                    priority=prepared.priority,
                )
                _send_request(process, request)
                run.request_ids[request_id], run.choices_left[request_id] = index, prepared.params.n
                self._runs[request_id] = run
            while (event := await run.mailbox.take()) is not None:
                yield event
        finally:
            self._abandon(run)

    def _abandon(self, run: _Run) -> None:
        """Nobody reads it any more."""
        for request_id in run.request_ids:
            self._runs.pop(request_id, None)
        if run.request_ids and self._process is not None:
            self._process.send(Cancel(tuple(run.request_ids)))

    async def record(self, steps: int, seconds: float) -> bytes:
        """A trace of the engine's next steps, in Chrome's JSON format: so many, or those of so many seconds.

        Raises:
            ApiError: 422 too many of them, 429 another is being recorded, 503 there is no engine, or it ended
                meanwhile.
        """
        if not (1 <= steps <= MOST_STEPS and 0 < seconds <= MOST_SECONDS):
            raise ApiError(422, f"A trace has 1 to {MOST_STEPS} steps, of at most {MOST_SECONDS:g} seconds")
        if self._recording is not None:
            raise ApiError(429, "A trace is being recorded already; try again when it is done")
        process = self._ready_process()
        self._recording = asyncio.get_running_loop().create_future()
        process.send(Record(steps, seconds))
        return await asyncio.shield(self._recording)

    async def stop(self) -> None:
        """End the process once what is to be kept is on disk; requests under way end with a 503."""
        self._stopping = True
        self._fail_all(self._unavailable())
        if self._process is not None:
            await self._process.stop(self._supervision.stop, loaded=self._state is State.READY)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self._become(State.FAILED, "the server was stopped")

    def _ready_process(self) -> EngineProcess:
        if self._stopping or self._state is not State.READY or self._process is None:
            raise self._unavailable()
        return self._process

    # The process's life

    async def _supervise(self) -> None:
        quick = 0
        while not self._stopping:
            started = time.monotonic()
            problem = await self._live_once()
            if self._stopping:
                return
            quick = quick + 1 if time.monotonic() - started < self._supervision.quick else 0
            if self._state is State.STARTING or quick >= self._supervision.most_quick:
                logger.error("the engine is given up: %s", problem)
                self._die(State.FAILED, problem)
                return
            self._die(State.RESTARTING, problem)
            pause = self._pause(quick)
            logger.error("%s; it is started again in %.1f s", problem, pause)
            await asyncio.sleep(pause)
            self.restarts += 1

    def _die(self, state: State, problem: str) -> None:
        self._statistics = Statistics()
        self._become(state, problem)
        self._fail_all(self._unavailable())

    def _pause(self, quick: int) -> float:
        if quick < 2:
            return 0.0
        return min(self._supervision.first_pause * 2.0 ** (quick - 2), self._supervision.longest_pause)

    async def _live_once(self) -> str:
        """Start the process and serve until it has ended: why it has."""
        failed = ""

        def handle(report: Report) -> None:
            nonlocal failed
            if isinstance(report, Failed):
                failed = report.message
            else:
                self._handle(report)

        try:
            if self._text is None:  # the folder may be another model's by now
                self._text = await asyncio.to_thread(FolderText.of, self.folder)
            self._process = process = await EngineProcess.spawn(self.folder, self._options)
        except (OSError, ValueError) as error:
            return f"the engine's process cannot be started: {error}"
        watchdog = asyncio.create_task(self._watch(process), name="engine-watchdog")
        try:
            status = await process.listen(handle)
        finally:
            watchdog.cancel()
            self._process = None
        return failed or _description(status, process.last_lines)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a process that hangs."""
        silence = self._supervision.silence
        while True:
            await asyncio.sleep(min(1.0, silence / 4))
            if self._state is State.READY and self._runs and time.monotonic() - process.heard_at > silence:
                logger.error("the engine said nothing for %.0f s while requests were under way; it is killed", silence)
                process.kill()

    def _become(self, state: State, problem: str = "") -> None:
        self._state, self._problem = state, problem
        self._changed.set()

    # What the engine reports

    def _handle(self, report: Report) -> None:
        match report:
            case News(deltas):
                for delta in deltas:
                    self._deliver(delta)
            case Statistics():
                self._statistics = report
            case Ready():
                assert self._text is not None
                self.expert_layers = report.expert_layers
                self._served, self._text = self._text.served(self.name, report), None
                self._become(State.READY)
            case Recorded(trace):
                if self._recording is not None and not self._recording.done():
                    self._recording.set_result(trace)
                self._recording = None

    def _deliver(self, delta: Delta) -> None:
        run = self._runs.get(delta.request_id)
        if run is None:  # its reader has gone
            return
        if delta.error or delta.finish_reason == "error":
            if run.choices_left[delta.request_id] > 1 and self._process is not None:  # its other choices go on
                self._process.send(Cancel((delta.request_id,)))
            self._end(run, delta.request_id)
            run.mailbox.fail(_failure(delta))
            return
        prompt = run.request_ids[delta.request_id]
        if delta.finish_reason is not None:
            run.choices_left[delta.request_id] -= 1
            if not run.choices_left[delta.request_id]:
                self._end(run, delta.request_id)
        run.mailbox.put(
            EngineEvent(
                prompt,
                delta.index,
                delta.text,
                delta.token_ids,
                delta.logprobs,
                delta.prompt_logprobs,
                delta.finish_reason,
                delta.stop_reason,
                delta.cached_tokens,
                delta.discarded_tokens,
                began=delta.began,
            )
        )

    def _end(self, run: _Run, request_id: int) -> None:
        del self._runs[request_id], run.request_ids[request_id], run.choices_left[request_id]

    def _fail_all(self, error: ApiError) -> None:
        runs, self._runs = self._runs, {}
        for run in dict.fromkeys(runs.values()):
            run.request_ids.clear()
            run.mailbox.fail(error)
        recording, self._recording = self._recording, None
        if recording is not None and not recording.done():
            recording.set_exception(error)

    def _unavailable(self) -> ApiError:
        message = "The server is stopping" if self._stopping else _UNAVAILABLE[self._state]
        return ApiError(503, message, code="engine_unavailable")


def _send_request(process: EngineProcess, request: Request) -> None:
    try:
        process.send(Add(request))
    except OverflowError as error:
        raise ApiError(422, "A whole number in the request is beyond 64 bits; give a smaller one") from error
    except RecursionError as error:
        raise ApiError(422, "A schema in the request is nested too deeply; make it flatter") from error
    except ValueError as error:  # half a surrogate pair
        raise of_value_error(error) from error


def _failure(delta: Delta) -> ApiError:
    if delta.refused:
        return of_value_error(ValueError(delta.error))
    return ApiError(500, f"The engine could not go on with this request: {delta.error}")


def _description(status: int, last_lines: Any) -> str:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    told = next((line for line in reversed(last_lines) if line.strip()), "")
    return f"the engine's process {how}" + (f" ({told.strip()})" if told else "")
