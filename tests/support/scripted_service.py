"""A service without an engine: it answers by a script, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any

from abyssal.engine.wire import Statistics
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import Origin, State
from tests.support.serving import events, served

Step = EngineEvent | ApiError | float
"""What a script does next: tell, fail, or wait so many seconds."""
Script = Callable[[Prepared], list[Step]]


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
        for prompt in range(len(prepared.prompts)):
            for choice in range(prepared.params.n):
                for event in events(served(), text, **fields):
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
