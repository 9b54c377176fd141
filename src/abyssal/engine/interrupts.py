"""Ctrl-C between the engine's steps, and not in the middle of one.

A step that is broken off leaves books half written: a sequence that is in no step and waits for the end of one, a page
that arrived and was not told of.  The engine has to throw them away then, with all that was cached and every request
under way, so a first interrupt waits for the step's end.  A second one does not, for steps that take too long.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unbroken() -> Iterator[None]:
    """Run the block to its end, and raise ``KeyboardInterrupt`` then if Ctrl-C was pressed meanwhile.

    In the main thread, which alone gets interrupts, and only while Python's own handler stands: who has set another
    knows what it does.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
