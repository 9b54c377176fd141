"""Where a request's events wait for its reader.

Whoever reads the engine's reports puts events in and never waits, so a client that reads slowly holds up nobody else.
What has not been taken yet of one choice is put together into one event: the box holds as much as the answer has, not
as many events as there were steps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.errors import ApiError


@dataclass
class _Waiting:
    """Events of one choice in a row."""

    first: EngineEvent
    last: EngineEvent
    text: list[str]
    token_ids: list[int]
    logprobs: list[TokenLogprobs]

    @classmethod
    def of(cls, event: EngineEvent) -> _Waiting:
        return cls(event, event, [event.text], list(event.token_ids), list(event.logprobs))

    def add(self, event: EngineEvent) -> None:
        self.last = event
        self.text.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs

    def joined(self) -> EngineEvent:
        if len(self.text) == 1:
            return self.last
        return replace(
            self.last,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.first.prompt_logprobs,
            began=self.first.began,
        )


@dataclass
class Mailbox:
    """Events of one answer, until all of its ``left`` choices have ended."""

    left: int
    _waiting: dict[tuple[int, int], _Waiting] = field(default_factory=dict)
    _error: ApiError | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: EngineEvent) -> None:
        """The next event of a choice."""
        choice = event.prompt, event.choice
        if (waiting := self._waiting.get(choice)) is not None:
            waiting.add(event)
        else:
            self._waiting[choice] = _Waiting.of(event)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """No more events come; what waits is still taken."""
        self._error = self._error or error
        self._news.set()

    async def take(self) -> EngineEvent | None:
        """The next event, of the choice that waits longest; None when all have ended.

        Raises:
            ApiError: what :meth:`fail` was told.
        """
        while not self._waiting:
            if not self.left:
                return None
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        event = self._waiting.pop(next(iter(self._waiting))).joined()
        self.left -= event.finish_reason is not None
        return event
