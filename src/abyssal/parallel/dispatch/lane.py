"""Where a dispatcher's communication goes on by itself: one thread, strictly first in, first out.

Several hops follow one another without anybody waiting, so work is queued here when it is started and its handle is
waited for when the result is needed.  Collectives of one group must be started in one order on all its ranks; as all
ranks start their work in one order and a lane runs it in that order, they are, whatever the ranks wait for in between.

On a GPU the thread only enqueues: its work goes to a stream of its own, which first waits for the stream that the
caller used, and waiting for a handle makes the caller's stream wait, not the caller.

The trade-off not taken: collectives started by the caller and continued by its waits.  They need no thread, and stand
still while the caller computes, which is when they should move.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class CommunicationError(RuntimeError):
    """Communication failed, by itself or because work before it did; the message says what was being done."""


class Lane:
    """A thread for the collectives of one dispatcher.  It starts with the first work and is a daemon.

    The thread ends when the lane is closed, or when nobody has it any more.

    Args:
        device: of the tensors; on a GPU the work goes to a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._jobs.put, None)

    def submit(self, doing: str, function: Callable[[], Result]) -> Job[Result]:
        """Queue ``function``; ``doing`` is how an error names it.  Tensors that it reads must not change until then."""
        if not self._end.alive:
            raise CommunicationError(f"{doing}: the dispatcher is closed; open another")
        job = Job(doing, function, self._stream)
        if self._thread is None:
            arguments = self._jobs, self._device, self._stream
            self._thread = threading.Thread(target=_serve, args=arguments, name="dispatch", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return job

    def close(self, timeout: float = 5.0) -> None:
        """End the thread once the work queued so far is done; work that hangs is left to the group's own timeout."""
        self._end()
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None


def _serve(jobs: Jobs, device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """The thread's life.  It does not know the lane, which may so be forgotten."""
    if stream is not None:
        torch.cuda.set_device(device)
    failure: Exception | None = None
    with torch.no_grad(), torch.cuda.stream(stream):
        while (job := jobs.get()) is not None:
            job.run(failure)
            # Once a rank left out a collective, the next would meet another of its peers'.
            failure = failure or job.failure
            del job


class Job(Generic[Result]):
    """The handle of work on a lane; it may be waited for several times."""

    def __init__(self, doing: str, function: Callable[[], Result], stream: torch.cuda.Stream | None) -> None:
        self._doing = doing
        self._function: Callable[[], Result] | None = function
        self._stream = stream
        self._given = torch.cuda.current_stream(stream.device).record_event() if stream is not None else None
        self._finished: Any = None
        self._done = threading.Event()
        self._result: Result | None = None
        self._error: Exception | None = None
        self.ended: float | None = None
        """When the work was done, or on a GPU enqueued, by ``time.perf_counter``."""

    @property
    def failure(self) -> Exception | None:
        """What failed, once it has."""
        return self._error

    def run(self, earlier_failure: Exception | None) -> None:
        """On the lane's thread: the work, or the failure of what came before it."""
        assert self._function is not None
        try:
            if earlier_failure is not None:
                message = f"{self._doing}: not done, because before it: {earlier_failure}"
                raise CommunicationError(message) from earlier_failure
            if self._stream is not None and self._given is not None:
                self._stream.wait_event(self._given)
            self._result = self._function()
            if self._stream is not None:
                self._finished = self._stream.record_event()
        except CommunicationError as error:
            self._error = error
        except Exception as error:
            self._error = CommunicationError(f"{self._doing}: {error}")
            self._error.__cause__ = error
        finally:
            if self._stream is None:
                self._function = None  # on a GPU the inputs are kept until somebody has waited
            self.ended = time.perf_counter()
            self._done.set()

    def wait(self) -> Result:
        """The result.

        Raises:
            CommunicationError: the work failed.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._finished is not None and self._stream is not None:
            stream = torch.cuda.current_stream(self._stream.device)
            stream.wait_event(self._finished)
            for tensor in self._result if isinstance(self._result, tuple) else ():
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
            self._function = None
        return self._result  # type: ignore[return-value]


Jobs = queue.SimpleQueue[Job[Any] | None]
