"""The engine's own process: ``python -m abyssal.engine.worker FOLDER --socket ADDRESS [--options JSON]``.

A server's front starts it, sends :data:`~abyssal.engine.wire.Command` and reads :data:`~abyssal.engine.wire.Report`
over a socket of zmq, one front and one engine; so HTTP, slow clients and text formats never hold up a step.

The process ends on ``Stop`` or SIGTERM, after the step that it is in, when everything that is to be kept is on disk;
and when its front is gone, which the end of its standard input tells, however the front died.  Ctrl-C in a terminal
reaches front and engine alike, and the front decides; so it is passed over here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

import abyssal
from abyssal.cache.folder import CacheFolder, default_folder
from abyssal.cache.pages import PAGE
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.loads import expert_layers
from abyssal.engine.loop import EngineLoop
from abyssal.engine.meter import EngineMeter
from abyssal.engine.opening import OpenedFolder, open_folder
from abyssal.engine.wire import Failed, Ready, Report
from abyssal.text.chat_format import ChatFormat

ORPHAN_SECONDS = 5.0
"""Without its front, a step that is under way may take so long to end."""
LINGER_MILLISECONDS = 1000

EXIT_FAILED = 1
EXIT_ORPHANED = 3

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the process; its exit status."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    front = _Front(options.socket)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # a front that is behind must not hold up a step
    socket.linger = LINGER_MILLISECONDS
    socket.connect(options.socket)
    try:
        return _run(Path(options.folder), options.options, socket, front)
    finally:
        if front.gone:
            socket.linger = 0
            front.clear_up()
        socket.close()
        context.term()


def _run(folder: Path, options: str, socket: zmq.Socket[bytes], front: _Front) -> int:
    try:
        config, dtype = read_options(options)
        opened = open_folder(folder, config, dtype)
        engine = _engine(folder, opened, config)
        meter = EngineMeter(engine, _disk_folder(opened, config))
        loop = EngineLoop(engine, meter, socket)
        _tell(socket, _ready(engine, opened, config))
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            logger.exception("the engine cannot start")
        _tell(socket, Failed(_sentence(error)))
        return EXIT_FAILED

    def stop(*_: object) -> None:
        loop.stopping = True

    signal.signal(signal.SIGTERM, stop)
    front.when_gone(stop)
    loop.run()
    engine.close()
    if opened.stored is not None:
        opened.stored.close()
    return EXIT_ORPHANED if front.gone else 0


def read_options(text: str) -> tuple[EngineConfig, torch.dtype | None]:
    """The engine's configuration, and the dtype of its weights; None: the folder's.

    Args:
        text: fields of ``EngineConfig``, and ``dtype``, as a JSON object.

    Raises:
        ValueError: an option that there is not, or a value that cannot be.
    """
    options = msgspec.json.decode(text, type=dict[str, Any])
    dtype = options.pop("dtype", None)
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"engine options: dtype {dtype!r} must be float32 or bfloat16; leave it out for the folder's")
    return _config(options), None if dtype is None else getattr(torch, dtype)


def _config(options: Mapping[str, Any]) -> EngineConfig:
    fields = EngineConfig.__dataclass_fields__
    for name in options:
        if name not in fields:
            raise ValueError(f"engine options: {name!r} is unknown; there are dtype, {', '.join(fields)}")
    try:
        return msgspec.convert(options, EngineConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"engine options: {error}") from error


def _engine(folder: Path, opened: OpenedFolder, config: EngineConfig) -> Engine:
    """Its text shows the marks of calls and reasoning, which the front reads."""
    chat = ChatFormat.of_folder(folder, opened.tokenizer)
    engine = Engine(opened.model, chat.shown(opened.tokenizer), config, stored=opened.stored)
    engine.warm_up()
    return engine


def _disk_folder(opened: OpenedFolder, config: EngineConfig) -> CacheFolder | None:
    if opened.stored is None:
        return None
    return CacheFolder(default_folder() if config.disk_cache_folder is None else Path(config.disk_cache_folder))


def _ready(engine: Engine, opened: OpenedFolder, config: EngineConfig) -> Ready:
    model, spec = opened.model, opened.model.spec
    end = spec.eos_token_id
    named = f"{engine.weights_fingerprint} {abyssal.__version__} {config}"
    return Ready(
        max_length=min(spec.max_positions, config.num_pages(model) * PAGE),
        vocab_size=spec.vocab_size,
        ends=() if end is None else end if isinstance(end, tuple) else (end,),
        fingerprint="fp_" + hashlib.blake2b(named.encode(), digest_size=5).hexdigest(),
        num_drafts=config.drafts(model),
        expert_layers=expert_layers(model),
    )


class _Front:
    """Whether the front lives: it holds the other end of standard input, and never writes to it.

    A step that goes on for long after the front has gone is broken off.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._gone = threading.Event()
        self._stop: Callable[[], object] | None = None
        threading.Thread(target=self._watch, name="front-watcher", daemon=True).start()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def when_gone(self, stop: Callable[[], object]) -> None:
        """What to do then, or now if it has gone already."""
        self._stop = stop
        if self.gone:
            stop()

    def clear_up(self) -> None:
        """Remove what the front would have removed: the socket and its folder."""
        path = Path(self._address.removeprefix("ipc://"))
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        self._gone.set()
        if self._stop is not None:
            self._stop()
        time.sleep(ORPHAN_SECONDS)
        self.clear_up()
        os._exit(EXIT_ORPHANED)


def _tell(socket: zmq.Socket[bytes], report: Report) -> None:
    socket.send(msgspec.msgpack.encode(report))


def _sentence(error: Exception) -> str:
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
