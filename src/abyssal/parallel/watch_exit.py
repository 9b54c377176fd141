"""The process's edge: signals that a blocked main thread cannot handle, a message in one piece, and leaving at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

FLUSH_SECONDS = 2.0


class SignalPipe:
    """Signals as bytes to read, so that a thread hears of them while the main thread is blocked in a collective.

    Python's own handlers run on the main thread, between instructions; its wake-up descriptor is written at once.
    SIGTERM does nothing else any more, SIGINT goes on raising KeyboardInterrupt.  Must be made on the main thread;
    elsewhere it stays silent.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        self._old: tuple[Any, int] | None = None
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
            self._old = handler, signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def read(self) -> bytes:
        """Numbers of the signals since the last call."""
        try:
            return os.read(self.reader, 256)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """As it was before; on the thread that made it."""
        if self._old is not None:
            handler, descriptor = self._old
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)
        os.close(self._writer)
        os.close(self.reader)


def tell_at_once(message: str) -> None:
    """Write to standard error in one piece, past buffers whose lock another thread may hold."""
    line = "\n" if os.isatty(2) else ""  # a progress bar may be there
    left = f"{line}{message}\n".encode(errors="replace")
    with contextlib.suppress(OSError):  # where nobody reads it, what matters is to end
        while left:
            left = left[os.write(2, left) :]


def leave_process(code: int) -> None:
    """End at once, without exit handlers, which would wait for collectives that never end."""
    timer = threading.Timer(FLUSH_SECONDS, os._exit, [code])  # a full pipe must not keep this process
    timer.daemon = True
    timer.start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
