"""Where the main thread stands, seen from another thread: whether it moves, and whether it waits for other ranks.

Nothing has to be told by the code that is watched.  A thread that is at the very same instruction of the very same
frames each time one looks does not move.  A long operation looks the same, and so does a loop that spends all its time
in one, which is why whoever is watched also says when it got on, and where standing still is to be expected.  An
endless loop moves: it is left to the time limit of the collective that the others are in.

A rank *waits* for others in a call of ``torch.distributed`` or of something's ``wait``: the source of the call that the
innermost frame is in tells, as the instruction has its position in the file.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType, TracebackType

_WAITING_FILES = ("torch/distributed/", "abyssal/parallel/launch_meeting.py")
_WAITING_CALL = re.compile(r"(\.(wait|barrier|synchronize)|group\.(send|recv))\($")
_LOCKS = ("threading.py", "concurrent/futures/_base.py", "queue.py")
"""Where a thread stands that waits for another: in ``abyssal.parallel`` that is one that carries tokens to ranks."""
_WAITING_ON_GPU = re.compile(r"(^|\.)(item|tolist|cpu|float|int|bool|synchronize)\($")
"""A GPU's collectives return at once; what needs their result waits."""


@dataclass(frozen=True)
class Stand:
    """Where the main thread is."""

    place: int
    """The same as long as nothing moves."""
    waits: bool


def main_thread_stands(on_gpu: bool = False) -> Stand:
    """Where the main thread is now."""
    frame = _main_frame()
    return Stand(_place(frame), _waits(frame, on_gpu))


def main_thread_stack() -> str:
    """The main thread's stack, as a traceback prints it."""
    return "".join(traceback.format_stack(_main_frame()))


def root_of(error: BaseException) -> BaseException:
    """What an exception was raised from in the first place: itself, where it was raised from nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def raised_waiting(error: BaseException, on_gpu: bool = False) -> bool:
    """Whether an exception came out of a wait for other ranks, so that another may be the cause.

    What a thread of its own met, or an error that names what was waited for, was raised from it.
    """
    last: TracebackType | None = root_of(error).__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and is_waiting(last.tb_frame.f_code, last.tb_lasti, on_gpu)


def is_waiting(code: CodeType, instruction: int, on_gpu: bool = False) -> bool:
    """Whether a frame at this instruction waits for other ranks."""
    path = code.co_filename.replace("\\", "/")
    if any(part in path for part in _WAITING_FILES):
        return True
    called = _called(code, instruction)
    return bool(_WAITING_CALL.search(called) or (on_gpu and _WAITING_ON_GPU.search(called)))


def _waits(frame: FrameType, on_gpu: bool) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks, or for a thread of its own that does."""
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_filename.endswith(_LOCKS):
        inner = inner.f_back
    if inner is None or inner is frame:
        return is_waiting(frame.f_code, frame.f_lasti, on_gpu)
    return "abyssal/parallel/" in inner.f_code.co_filename.replace("\\", "/")


def _called(code: CodeType, instruction: int) -> str:
    """The source of what the call at this instruction calls, with its bracket: ``handle.wait(``."""
    line, end_line, begin, end = next(islice(code.co_positions(), instruction // 2, None), (None,) * 4)
    if line is None or end_line is None or begin is None or end is None:
        return ""
    lines = [linecache.getline(code.co_filename, number) for number in range(line, end_line + 1)]
    if not lines or not lines[0]:
        return ""
    lines[-1] = lines[-1].encode()[:end].decode(errors="replace")
    lines[0] = lines[0].encode()[begin:].decode(errors="replace")
    expression = "".join(lines)
    depth = 0
    for position in range(len(expression) - 1, -1, -1):  # back from the last bracket to the one that it closes
        depth += {")": 1, "(": -1}.get(expression[position], 0)
        if depth == 0:
            return expression[: position + 1] if expression[position] == "(" else ""
    return ""


def _main_frame() -> FrameType:
    main = threading.main_thread().ident
    assert main is not None
    return sys._current_frames()[main]


def _place(frame: FrameType | None) -> int:
    found = []
    while frame is not None:
        found.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(found))
