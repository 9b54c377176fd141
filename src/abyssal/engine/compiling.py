"""Forms of outputs made ready beside the steps: a large one takes half a second, for which others should not wait.

llguidance lets go of Python's lock while it compiles, so one thread does it, in the order in which requests came.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from abyssal.engine.core import Engine
from abyssal.engine.messages import Request
from abyssal.engine.structured import Structure


class FormCompiler:
    """Requests on their way to an engine, until their forms are compiled."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[int, tuple[Request, Future[Structure | None]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="form-compiler")

    @property
    def busy(self) -> bool:
        """Whether any request waits."""
        return bool(self._waiting)

    def begin(self, request: Request) -> None:
        self._waiting[request.request_id] = request, self._thread.submit(self._engine.compile, request)

    def take(self) -> list[tuple[Request, Future[Structure | None]]]:
        """Requests whose forms are compiled, or cannot be: each with what came of it."""
        done = [number for number, (_, future) in self._waiting.items() if future.done()]
        return [self._waiting.pop(number) for number in done]

    def cancel(self, request_ids: Collection[int]) -> list[Request]:
        """Those of them that wait do so no more."""
        cancelled = [self._waiting.pop(number) for number in request_ids if number in self._waiting]
        for _, future in cancelled:
            future.cancel()
        return [request for request, _ in cancelled]

    def close(self) -> None:
        """Nobody waits any more; what is being compiled is let run."""
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
