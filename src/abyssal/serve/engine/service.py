"""The model's own engine as a :class:`~abyssal.serve.service.Service`: its process, kept alive, and the requests in it.

    service = await EngineService.start(folder, "my-model", {"num_drafts": "auto"})   # returns at once
    await service.ready()                                                             # or raises what is wrong
    async for event in service.run(prepared, origin): ...
    await service.stop()

When the process dies, every request that was in it ends with a 503 in the same moment, and another one is started
(:mod:`abyssal.serve.engine.supervisor`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from abyssal.engine.messages import Request
from abyssal.engine.wire import Add, Cancel, News, Ready, Record, Recorded, Report, Statistics
from abyssal.serve.engine.process import EngineProcess
from abyssal.serve.engine.runs import Runs
from abyssal.serve.engine.served import FolderText
from abyssal.serve.engine.supervisor import Supervision, Supervisor
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


class EngineService:
    """Requests of one model to one engine's process.  Make it by :meth:`start`."""

    def __init__(self, folder: Path, name: str, engine_options: Mapping[str, Any], supervision: Supervision) -> None:
        self.folder = folder
        self.name = name
        self.statistics = Statistics()
        self.expert_layers: tuple[int, ...] = ()
        """Numbers of the layers with experts, once the model was loaded: the rows of ``statistics.expert_loads``."""
        self._options = dict(engine_options)
        self._served: ServedModel | None = None
        self._text: FolderText | None = None
        self._runs = Runs()
        self._recording: asyncio.Future[bytes] | None = None
        self._supervisor = Supervisor(supervision, self._spawn, self._hear, self._lost, lambda: bool(self._runs))

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
        service._supervisor.start()
        return service

    async def ready(self) -> ServedModel:
        """Wait until the model is loaded, for the first time or again.

        Raises:
            ValueError: it cannot be: what is wrong, in one sentence.
        """
        await self._supervisor.ready()
        return self.served

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def problem(self) -> str:
        """Why the engine does not run, where it does not."""
        return self._supervisor.problem

    @property
    def restarts(self) -> int:
        """How often the process was started again."""
        return self._supervisor.restarts

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        process = self._supervisor.process
        return None if process is None else process.pid

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
    def num_running(self) -> int:
        """Engine requests that have not ended."""
        return len(self._runs)

    async def run(self, prepared: Prepared, origin: Origin) -> AsyncGenerator[EngineEvent, None]:
        process, run = self._process(), self._runs.begin(prepared)
        try:
            for index, prompt in enumerate(prepared.prompts):
                request = Request(
                    self._runs.enter(run, index),
                    tuple(prompt),
                    prepared.params,
                    user=origin.user,
                    namespace=origin.namespace,
                    priority=prepared.priority,
                )
                _send(process, request)
            while (event := await run.mailbox.take()) is not None:
                yield event
        finally:
            if left := self._runs.leave(run):
                self._send_if_alive(Cancel(left))

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
        process = self._process()
        self._recording = asyncio.get_running_loop().create_future()
        process.send(Record(steps, seconds))
        return await asyncio.shield(self._recording)

    async def stop(self) -> None:
        """End the process once what is to be kept is on disk; requests under way end with a 503."""
        self._supervisor.stopping = True
        self._lost()
        await self._supervisor.stop()

    def _process(self) -> EngineProcess:
        supervisor = self._supervisor
        if supervisor.stopping or supervisor.state is not State.READY or supervisor.process is None:
            raise self._unavailable()
        return supervisor.process

    def _send_if_alive(self, command: Cancel) -> None:
        if self._supervisor.process is not None:
            self._supervisor.process.send(command)

    def _unavailable(self) -> ApiError:
        message = "The server is stopping" if self._supervisor.stopping else _UNAVAILABLE[self.state]
        return ApiError(503, message, code="engine_unavailable")

    # What the supervisor calls

    async def _spawn(self) -> EngineProcess:
        if self._text is None:  # the folder may be another model's by now
            self._text = await asyncio.to_thread(FolderText.of, self.folder)
        return await EngineProcess.spawn(self.folder, self._options)

    def _hear(self, report: Report) -> None:
        match report:
            case News(deltas):
                for delta in deltas:
                    if self._runs.deliver(delta):
                        self._send_if_alive(Cancel((delta.request_id,)))
            case Statistics():
                self.statistics = report
            case Ready():
                assert self._text is not None
                self.expert_layers = report.expert_layers
                self._served, self._text = self._text.served(self.name, report), None
            case Recorded(trace):
                self._recorded(trace)

    def _recorded(self, outcome: bytes | ApiError) -> None:
        recording, self._recording = self._recording, None
        if recording is None or recording.done():
            return
        if isinstance(outcome, bytes):
            recording.set_result(outcome)
        else:
            recording.set_exception(outcome)
            recording.exception()  # whoever asked may have gone: then nobody looks at it

    def _lost(self) -> None:
        """Nothing is under way any more."""
        self.statistics = Statistics()
        self._runs.fail_all(self._unavailable())
        self._recorded(self._unavailable())


def _send(process: EngineProcess, request: Request) -> None:
    """
    Raises:
        ApiError: it holds what cannot be sent.
    """
    try:
        process.send(Add(request))
    except OverflowError as error:
        raise ApiError(422, "A whole number in the request is beyond 64 bits; give a smaller one") from error
    except RecursionError as error:
        raise ApiError(422, "A schema in the request is nested too deeply; make it flatter") from error
    except ValueError as error:  # half a surrogate pair
        raise of_value_error(error) from error
