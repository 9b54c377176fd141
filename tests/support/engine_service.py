"""A service over a real engine's process, for tests that are no coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from abyssal.engine.messages import SamplingParams
from abyssal.engine.wire import Statistics
from abyssal.serve.engine.service import EngineService
from abyssal.serve.engine.supervisor import Supervision
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.service import Origin

NAME = "served"
ORIGIN = Origin("request-1")

_T = TypeVar("_T")


class RunningService:
    """A service on an event loop in a thread.  Close it."""

    def __init__(self, folder: Path, supervision: Supervision | None = None, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.service = self.run(EngineService.start(folder, NAME, options, supervision))

    def run(self, coroutine: Coroutine[Any, Any, _T], seconds: float = 60.0) -> _T:
        """What a coroutine on the service's loop comes to."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    def ready(self) -> EngineService:
        """The service, when the model is loaded."""
        self.run(self.service.ready())
        return self.service

    def answer(self, prepared: Prepared, origin: Origin = ORIGIN) -> dict[int, EngineEvent]:
        """All of an answer: one event a choice, by its index in the response."""
        return self.run(collect(self.service, prepared, origin))

    def close(self) -> None:
        self.run(self.service.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def prepared(prompts: Sequence[Sequence[int]], params: SamplingParams, **fields: Any) -> Prepared:
    """A request of token ids."""
    return Prepared(tuple(map(tuple, prompts)), params, NAME, **fields)


async def collect(service: EngineService, request: Prepared, origin: Origin = ORIGIN) -> dict[int, EngineEvent]:
    """Read an answer to its end."""
    found: dict[int, EngineEvent] = {}
    async for event in service.run(request, origin):
        choice = request.choice_of(event)
        found[choice] = event if choice not in found else joined(found[choice], event)
    return found


def joined(first: EngineEvent, second: EngineEvent) -> EngineEvent:
    """Two events of a choice in a row as one."""
    assert first.finish_reason is None and second.prompt_logprobs is None is second.began
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs,
        began=first.began,
    )


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def newest_statistics(service: EngineService) -> Statistics:
    """Those of a moment after everything that was heard of: they come in order with the news."""
    seen = service.statistics
    await until(lambda: service.statistics is not seen)
    return service.statistics
