"""A service without an engine: it answers by a script, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from abyssal.engine.wire import Statistics
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import Origin, State
from tests.support.serving import events, scored, served

Step = EngineEvent | ApiError | float
"""What a script does next: tell, fail, or wait so many seconds."""
Script = Callable[[Prepared], Sequence[Step]]


@dataclass
class Ran:
    """A request that was run."""

    prepared: Prepared
    origin: Origin
    ended: bool = False
    """To its end."""
    cancelled: bool = False


def saying(text: str, pause: float = 0.0, first: float = 0.0, **fields: Any) -> Script:
    """Every choice says ``text``, a token an event.

    Args:
        pause: seconds between events.
        first: seconds before the first.
    """

    def script(prepared: Prepared) -> list[Step]:
        steps: list[Step] = [first] if first else []
        params = prepared.params
        for prompt, ids in enumerate(prepared.prompts):
            for choice in range(params.n):
                told = events(served(), text, scores=params.logprobs is not None, **fields)
                if params.prompt_logprobs is not None:
                    scores = (None, *map(scored, ids[1:]))
                    told[0] = replace(told[0], prompt_logprobs=scores)
                for event in told:
                    steps += [replace(event, prompt=prompt, choice=choice), *([pause] if pause else [])]
        return steps

    return script


class ScriptedService:
    """Runs every request by the same script."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or saying("the tools")
        self.state = State.READY
        self.statistics = Statistics()
        self.ran: list[Ran] = []

    @property
    def running(self) -> int:
        return sum(not (ran.ended or ran.cancelled) for ran in self.ran)

    async def run(self, prepared: Prepared, origin: Origin) -> AsyncGenerator[EngineEvent, None]:
        ran = Ran(prepared, origin)
        self.ran.append(ran)
        try:
            for step in self.script(prepared):
                if isinstance(step, ApiError):
                    raise step
                if isinstance(step, float | int):
                    await asyncio.sleep(step)
                else:
                    yield step
            ran.ended = True
        finally:
            ran.cancelled = not ran.ended
