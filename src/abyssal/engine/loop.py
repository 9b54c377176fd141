"""The loop of an engine's process: commands in between steps, news of each step out.

Commands are taken without waiting while there is anything to compute, so that nothing outside holds up a step; without
requests the loop waits for one.  Forms of outputs are compiled in a thread beside the steps.  A request that cannot run
is refused in a delta of its own, and a step that fails ends the requests that were in it; neither ends the loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec
import zmq

from abyssal.engine.compiling import FormCompiler
from abyssal.engine.core import Engine
from abyssal.engine.deltas import DeltaTeller
from abyssal.engine.messages import Request
from abyssal.engine.meter import EngineMeter
from abyssal.engine.recorder import StepRecorder
from abyssal.engine.structured import Structure
from abyssal.engine.wire import Add, Cancel, Command, Delta, News, Record, Recorded, Report, Stop

BUSY_SECONDS = 0.25
"""Between statistics, while there is something to compute."""
IDLE_SECONDS = 1.0
POLL_SECONDS = 0.25
"""How long a wait for commands lasts before the clock and :attr:`EngineLoop.stopping` are looked at."""
COMPILE_SECONDS = 0.002
"""The same, while a form is being compiled."""

logger = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class EngineLoop:
    """Runs an engine for whoever is at the other end of a socket.

    Args:
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        meter: EngineMeter,
        socket: zmq.Socket[bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._socket = socket
        self._clock = clock
        self._teller = DeltaTeller()
        self._compiler = FormCompiler(engine)
        self._recorder: StepRecorder | None = None
        self._step_due = False  # ends to be told of, though nothing is under way
        self._told_at = float("-inf")
        self.stopping = False
        """Set by whoever wants it to end: after the step that it is in."""

    def run(self) -> None:
        """Until it is to stop."""
        self._tell_statistics()
        while not self.stopping:
            self._take_commands()
            self._take_compiled()
            if self._engine.unfinished or self._step_due:
                self._step()
            else:
                self._socket.poll(int(1000 * (COMPILE_SECONDS if self._compiler.busy else POLL_SECONDS)))
                self._tell_statistics(IDLE_SECONDS)
            self._tell_record()
        self._compiler.close()

    def _take_commands(self) -> None:
        # To ask costs half of a receive that finds nothing.
        while not self.stopping and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            message = self._socket.recv(zmq.NOBLOCK)
            try:
                self._obey(_decoder.decode(message))
            except msgspec.DecodeError as error:
                self._refuse_unread(message, error)

    def _obey(self, command: Command) -> None:
        match command:
            case Add():
                self._begin(command.request)
            case Cancel(request_ids):
                self._cancel(request_ids)
            case Record(steps, seconds):
                self._recorder = StepRecorder(steps, seconds)
                self._engine.on_phase = self._recorder.phase
            case Stop():
                self.stopping = True

    def _begin(self, request: Request) -> None:
        if request.params.structured is None:
            self._add(request)
        else:
            self._compiler.begin(request)

    def _take_compiled(self) -> None:
        for request, compiled in self._compiler.take():
            self._add(request, compiled)

    def _cancel(self, request_ids: Sequence[int]) -> None:
        for request in self._compiler.cancel(request_ids):
            ends = [Delta(request.request_id, n, finish_reason="cancelled") for n in range(request.params.n)]
            self._send(News(tuple(ends)))
        for request_id in request_ids:
            self._engine.cancel(request_id)
        self._step_due = True

    def _add(self, request: Request, compiled: Future[Structure | None] | None = None) -> None:
        number = request.request_id
        try:
            self._engine.add(request, None if compiled is None else compiled.result())
        except ValueError as error:
            self._refuse(number, str(error), refused=True)
        except Exception as error:  # whatever a request brings about is its own trouble
            logger.exception("request %d could not be queued", number)
            self._refuse(number, f"{type(error).__name__} {error}", refused=False)

    def _refuse(self, number: int, message: str, refused: bool) -> None:
        self._send(News((Delta(number, finish_reason="error", error=message, refused=refused),)))

    def _refuse_unread(self, message: bytes, error: msgspec.DecodeError) -> None:
        """A command that is none.  Where it was to be a request, its reader hears so."""
        logger.error("a command could not be read: %s", error)
        try:
            number = msgspec.msgpack.decode(message)["request"]["request_id"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return
        self._refuse(number, str(error), refused=True)

    def _step(self) -> None:
        self._step_due = False
        if self._recorder is not None:
            self._recorder.begin()
        begun = time.perf_counter()
        try:
            outputs = self._engine.step()
        except Exception:
            logger.exception("a step failed; the requests under way end, and the engine goes on")
            self._step_due = True  # the next one tells of them
            return
        finally:
            self._meter.note_step(time.perf_counter() - begun)
        deltas = self._teller.tell(outputs)
        if self._recorder is not None:
            self._recorder.phase("update")
        if deltas:
            self._send(News(tuple(deltas)))
        self._tell_statistics(BUSY_SECONDS if self._engine.unfinished else 0.0)
        if self._recorder is not None:
            self._recorder.phase("send")
            self._recorder.end(self._meter.statistics())

    def _tell_statistics(self, interval: float = 0.0) -> None:
        """Unless it was done within ``interval`` seconds."""
        now = self._clock()
        if now - self._told_at >= interval:
            self._told_at = now
            self._send(self._meter.statistics())

    def _tell_record(self) -> None:
        if self._recorder is not None and self._recorder.done:
            self._send(Recorded(self._recorder.trace()))
            self._recorder = self._engine.on_phase = None

    def _send(self, report: Report) -> None:
        self._socket.send(_encoder.encode(report), zmq.NOBLOCK)
