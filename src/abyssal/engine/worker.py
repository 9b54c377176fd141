"""The engine's own process: ``python -m abyssal.engine.worker FOLDER --socket ADDRESS [--options JSON]``.

A server's front starts it, sends :data:`~abyssal.engine.wire.Command` and reads :data:`~abyssal.engine.wire.Report`
over a socket of zmq, one front and one engine.  Between two steps the commands that have come are taken in, without
waiting; without requests the process waits for one.  So HTTP, slow clients and text formats never hold up a step.

The process ends on ``Stop`` or SIGTERM, after the step that it is in, when everything that is to be kept is on disk;
and when its front is gone, which the end of its standard input tells, however the front died.  Ctrl-C in a terminal
reaches front and engine alike, and the front decides; so it is passed over here.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
import zmq

import abyssal
from abyssal.cache.pages import PAGE
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.deltas import DeltaTeller
from abyssal.engine.meter import EngineMeter
from abyssal.engine.opening import open_folder
from abyssal.engine.stored import StoredPages
from abyssal.engine.wire import Add, Cancel, Command, Delta, Failed, News, Ready, Record, Report, Stop
from abyssal.text.chat_format import ChatFormat

BUSY_STATISTICS_SECONDS = 0.25
IDLE_STATISTICS_SECONDS = 2.0
POLL_SECONDS = 0.25
"""How long a wait for commands lasts before signals and the clock are looked at."""
ORPHAN_SECONDS = 5.0
"""Without its front, a step that is under way may take so long to end."""

EXIT_FAILED = 1
EXIT_ORPHANED = 3

logger = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class Worker:
    """Runs an engine for the front at the other end of a socket.

    Args:
        stored: flushed and closed at the end.
    """

    def __init__(
        self,
        engine: Engine,
        stored: StoredPages | None,
        socket: zmq.Socket[bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._stored = stored
        self._socket = socket
        self._clock = clock
        self._teller = DeltaTeller()
        self._meter = EngineMeter(engine)
        self._step_due = False  # ends to be told of, though nothing is under way
        self._told_at = float("-inf")
        self.stopping = False
        """Set by whoever wants it to end."""

    def run(self) -> None:
        """Until it is to stop."""
        self._tell_statistics()
        while not self.stopping:
            self._take_commands()
            if self._engine.unfinished or self._step_due:
                self._step()
            else:
                self._socket.poll(int(POLL_SECONDS * 1000))
                self._tell_statistics(IDLE_STATISTICS_SECONDS)

    def close(self) -> None:
        """Write what is to be kept."""
        self._engine.close()
        if self._stored is not None:
            self._stored.close()

    def _take_commands(self) -> None:
        while not self.stopping:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                command = _decoder.decode(message)
            except msgspec.DecodeError as error:
                self._refuse_unread(message, error)
                continue
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Add():
                self._add(command)
            case Cancel(request_ids):
                for request_id in request_ids:
                    self._engine.cancel(request_id)
                self._step_due = True
            case Record():
                pass
            case Stop():
                self.stopping = True

    def _add(self, command: Add) -> None:
        try:
            self._engine.add(command.request)
        except ValueError as error:
            self._refuse(command.request.request_id, str(error), refused=True)
        except Exception as error:
            logger.exception("request %d could not be queued", command.request.request_id)
            self._refuse(command.request.request_id, f"{type(error).__name__} {error}", refused=False)

    def _refuse(self, request_id: int, message: str, refused: bool) -> None:
        self._send(News((Delta(request_id, finish_reason="error", error=message, refused=refused),)))

    def _refuse_unread(self, message: bytes, error: msgspec.DecodeError) -> None:
        """A command that is none; of a request, the front hears so."""
        logger.error("a command could not be read: %s", error)
        try:
            request_id = msgspec.msgpack.decode(message)["request"]["request_id"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return
        self._refuse(request_id, str(error), refused=True)

    def _step(self) -> None:
        self._step_due = False
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
        if deltas:
            self._send(News(tuple(deltas)))
        self._tell_statistics(BUSY_STATISTICS_SECONDS if self._engine.unfinished else 0.0)

    def _tell_statistics(self, interval: float = 0.0) -> None:
        """Unless it was done within ``interval`` seconds."""
        now = self._clock()
        if now - self._told_at >= interval:
            self._told_at = now
            self._send(self._meter.statistics())

    def _send(self, report: Report) -> None:
        self._socket.send(_encoder.encode(report), zmq.NOBLOCK)


def main(argv: list[str] | None = None) -> int:
    """Run the process; its exit status."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    front_gone = threading.Event()
    threading.Thread(target=_watch_front, args=(front_gone,), name="front-watcher", daemon=True).start()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # a front that is behind must not hold up a step
    socket.linger = 1000
    socket.connect(options.socket)
    try:
        try:
            worker, ready = _start(options.folder, json_options(options.options), socket)
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)):
                logger.exception("the engine cannot start")
            socket.send(_encoder.encode(Failed(_sentence(error))))
            return EXIT_FAILED
        socket.send(_encoder.encode(ready))
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(worker, "stopping", True))
        _when(front_gone, lambda: setattr(worker, "stopping", True))
        worker.run()
        worker.close()
        return EXIT_ORPHANED if front_gone.is_set() else 0
    finally:
        socket.close(0 if front_gone.is_set() else None)
        context.term()


def json_options(text: str) -> dict[str, Any]:
    """The engine's options as the command line has them."""
    options = msgspec.json.decode(text)
    if not isinstance(options, dict):
        raise ValueError(f"options: {text} must be a JSON object of EngineConfig's fields")
    return options


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """
    Raises:
        ValueError: an option that there is not, or a value of another type.
    """
    fields = EngineConfig.__dataclass_fields__
    for name in options:
        if name not in fields:
            raise ValueError(f"engine options: {name!r} is unknown; there are dtype, {', '.join(fields)}")
    try:
        return msgspec.convert(dict(options), EngineConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"engine options: {error}") from error


def _start(folder: str, options: dict[str, Any], socket: zmq.Socket[bytes]) -> tuple[Worker, Ready]:
    dtype = options.pop("dtype", None)
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"engine options: dtype {dtype!r} must be float32 or bfloat16; leave it out for the folder's")
    config = engine_config(options)
    opened = open_folder(folder, config, None if dtype is None else getattr(torch, dtype))
    chat = ChatFormat.of_folder(folder, opened.tokenizer)
    engine = Engine(opened.model, chat.shown(opened.tokenizer), config, stored=opened.stored)
    return Worker(engine, opened.stored, socket), _ready(engine, opened.model, config)


def _ready(engine: Engine, model: Any, config: EngineConfig) -> Ready:
    spec = model.spec
    named = f"{engine.weights_fingerprint} {abyssal.__version__} {config}"
    end = spec.eos_token_id
    return Ready(
        max_length=min(spec.max_positions, config.num_pages(model) * PAGE),
        vocab_size=spec.vocab_size,
        ends=() if end is None else end if isinstance(end, tuple) else (end,),
        fingerprint="fp_" + hashlib.blake2b(named.encode(), digest_size=5).hexdigest(),
        num_drafts=config.drafts(model),
        expert_layers=tuple(block.layer for block in model.layers if block.placement is not None),
    )


def _watch_front(gone: threading.Event) -> None:
    """The front holds the other end of standard input, and never writes to it."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    gone.set()
    time.sleep(ORPHAN_SECONDS)
    os._exit(EXIT_ORPHANED)


def _when(event: threading.Event, action: Callable[[], object]) -> None:
    threading.Thread(target=lambda: (event.wait(), action()), daemon=True).start()


def _sentence(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return told if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {told}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="abyssal.engine.worker", description="The engine of a server.")
    parser.add_argument("folder", help="of the model")
    parser.add_argument("--socket", required=True, help="address of the front's socket")
    parser.add_argument("--options", default="{}", help="fields of EngineConfig, and dtype, as a JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
