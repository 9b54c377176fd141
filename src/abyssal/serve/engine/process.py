"""The engine's process as the server's front sees it: started, listened to, ended.

One object is one process; :mod:`abyssal.serve.engine.service` starts another when it has died.  Commands and reports go
over a socket in a folder that nobody else can enter.  The process holds the other end of a pipe to its standard input,
so that it ends when this one does, however that dies; and it has a process group of its own, so that Ctrl-C in a
terminal reaches the front alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from abyssal.engine.wire import Command, Report, Stop

LAST_LINES = 20
"""Lines of its log that are kept to explain its end."""
LOG_SECONDS = 0.5
"""After its end, for the rest of its log to be read."""
DRAIN_MILLISECONDS = 20
"""After its end, for each report that may still come."""
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

logger = logging.getLogger("abyssal.engine")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class EngineProcess:
    """A process that runs ``abyssal.engine.worker``.  Make it by :meth:`spawn`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        context: zmq.asyncio.Context,
        folder: Path,
    ) -> None:
        self._process = process
        self._socket = socket
        self._context = context
        self._folder = folder
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        """The newest of its log."""
        self.heard_at = time.monotonic()
        """When its newest report came."""

    @classmethod
    async def spawn(cls, folder: Path, options: Mapping[str, Any]) -> EngineProcess:
        """Start the engine of a model folder; it says ``Ready`` or ``Failed`` once it knows.

        Args:
            options: fields of ``EngineConfig``, and ``dtype``.

        Raises:
            OSError: the system has no room for it, or allows no socket in the folder for temporary files.
        """
        own = Path(tempfile.mkdtemp(prefix="abyssal-engine-"))  # mode 0700
        context = zmq.asyncio.Context()
        try:
            socket = context.socket(zmq.PAIR)
            socket.set_hwm(0)
            socket.linger = 0
            address = f"ipc://{own}/socket"
            socket.bind(address)
            # -P: no module of the folder in which the server was started takes the place of a library's
            command = [sys.executable, "-P", "-m", "abyssal.engine.worker", "--socket", address]
            process = await asyncio.create_subprocess_exec(
                *command,
                "--options",
                msgspec.json.encode(dict(options)).decode(),
                "--",  # a folder's name may begin with a dash
                str(folder),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                process_group=0,
            )
        except BaseException as error:
            context.destroy(0)
            shutil.rmtree(own, ignore_errors=True)
            if isinstance(error, zmq.ZMQError):
                raise OSError(f"{own}: {error}") from error
            raise
        return cls(process, socket, context, own)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send a command, without waiting.

        Raises:
            ValueError, OverflowError, RecursionError: it holds what cannot be sent: half a surrogate pair, a whole
                number beyond 64 bits, objects nested too deeply.
        """
        self._socket.send(_encoder.encode(command), zmq.NOBLOCK)

    async def listen(self, handle: Callable[[Report], None]) -> int:
        """Hand every report to ``handle``, which must not raise, until the process has ended; its exit status, or minus
        the signal that ended it.  Afterwards nothing of it is left."""
        reports = asyncio.create_task(self._read_reports(handle), name="engine-reports")
        log = asyncio.create_task(self._read_log(), name="engine-log")
        ended = asyncio.create_task(self._process.wait(), name="engine-process")
        try:
            await asyncio.wait((ended, reports), return_when=asyncio.FIRST_COMPLETED)
            if reports.done():
                logger.error("a report of the engine cannot be read; it is killed", exc_info=reports.exception())
                self.kill()
            status = await ended
            reports.cancel()
            await asyncio.wait((reports,))
            await self._drain(handle)
            await asyncio.wait((log,), timeout=LOG_SECONDS)
            return status
        finally:
            for task in (reports, log, ended):
                task.cancel()
            self.kill()
            self._context.destroy(0)
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _read_reports(self, handle: Callable[[Report], None]) -> None:
        while True:
            self._hand(await self._socket.recv(), handle)

    async def _drain(self, handle: Callable[[Report], None]) -> None:
        """What it said before it ended."""
        while await self._socket.poll(DRAIN_MILLISECONDS):
            self._hand(await self._socket.recv(), handle)

    def _hand(self, message: bytes, handle: Callable[[Report], None]) -> None:
        self.heard_at = time.monotonic()
        handle(_decoder.decode(message))

    async def _read_log(self) -> None:
        """Its lines, to this process's log."""
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._log(line.decode(errors="replace"))
        if rest:
            self._log(rest.decode(errors="replace"))

    def _log(self, line: str) -> None:
        self.last_lines.append(line)
        word, _, told = line.partition(" ")
        if word in _LEVELS:
            logger.log(logging.getLevelNamesMapping()[word], "%s", told)
        else:  # of a traceback, or a library's
            logger.warning("%s", line)

    async def stop(self, seconds: float, loaded: bool) -> None:
        """Ask it to write what is to be kept and to end; end it after so many seconds.  :meth:`listen` is to run
        meanwhile.

        Args:
            loaded: whether it has said ``Ready``; before, it reads no commands and there is nothing to keep.
        """
        if loaded:
            self.send(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        if self._process.returncode is None:
            if loaded:
                logger.warning("the engine's process did not end within %.0f s; it is killed", seconds)
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
