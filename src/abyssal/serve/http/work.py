"""What an endpoint has made of a request's body, ready to be run: by the engine, by another provider, or done already.

A work's :meth:`~Work.chunks` run it to its end, and yield what a stream shows; behind them, :meth:`~Work.body` is the
whole answer.  :attr:`~Work.usage` is at every moment what is to be charged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.observer import Watch
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.routing import Provider, Routed
from abyssal.serve.service import Origin, Service

Chunks = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What a work may cost."""

    prompt_tokens: int
    most_output_tokens: int
    """Of all its choices together."""


class Work(Protocol):
    """A request that can be run."""

    @property
    def model(self) -> str: ...

    @property
    def stream(self) -> bool: ...

    @property
    def most(self) -> Cost | None:
        """None: it is free."""
        ...

    @property
    def usage(self) -> Usage | None:
        """So far; None before anything was computed."""
        ...

    @property
    def user(self) -> str:
        """The caller's own, between whom service is shared fairly."""
        ...

    def chunks(self, origin: Origin, watch: Watch) -> AsyncGenerator[Chunks, None]:
        """Run it; closing the generator cancels it.

        Raises:
            ApiError: it failed.
        """
        ...

    def body(self) -> Mapping[str, Any]:
        """The whole answer, behind the last chunk."""
        ...


class Reply(Protocol):
    """The way back of one of the protocols."""

    @property
    def usage(self) -> Usage: ...

    def push(self, event: EngineEvent) -> list[dict[str, Any]]: ...

    def finish(self) -> list[dict[str, Any]]: ...

    def body(self) -> dict[str, Any]: ...


class EngineWork:
    """For the engine."""

    def __init__(self, service: Service, prepared: Prepared, reply: Reply, max_length: int) -> None:
        self.prepared = prepared
        self.model = prepared.model
        self.stream = prepared.stream
        self.user = prepared.user
        self.most = _most(prepared, max_length)
        self._service = service
        self._reply = reply
        self._begun: set[int] = set()

    @property
    def usage(self) -> Usage | None:
        """Prompts count from the first event of an answer to them: of one that is left or fails before, nobody knows
        how much was computed."""
        if not self._begun:
            return None
        lengths = map(len, self.prepared.prompts)
        begun = sum(length for number, length in enumerate(lengths) if number in self._begun)
        return replace(self._reply.usage, prompt_tokens=begun)

    async def chunks(self, origin: Origin, watch: Watch) -> AsyncGenerator[Chunks, None]:
        watch.prepared(self.prepared, origin)
        async with aclosing(self._service.run(self.prepared, origin)) as events:
            try:
                async for event in events:
                    watch.event(event)
                    if event.error is None:
                        self._begun.add(event.prompt)
                    if chunks := self._reply.push(event):
                        yield chunks
            except ApiError as error:
                raise error.renamed("structured", self.prepared.form_name) from None
        if self.stream:
            yield self._reply.finish()

    def body(self) -> Mapping[str, Any]:
        return self._reply.body()


class RoutedWork:
    """For another provider."""

    def __init__(self, provider: Provider, routed: Routed) -> None:
        self.model = routed.model
        self.stream = routed.stream
        self.user = ""
        self.most = Cost(routed.prompt_tokens, routed.most_output_tokens)
        self.usage: Usage | None = None
        self._provider = provider
        self._routed = routed
        self._body: Mapping[str, Any] = {}

    async def chunks(self, origin: Origin, watch: Watch) -> AsyncGenerator[Chunks, None]:
        async with aclosing(self._provider.run(self._routed, origin)) as pieces:
            async for piece in pieces:
                if piece.usage is not None:
                    self.usage = piece.usage if piece.usage != Usage() else None
                if piece.body is None:
                    continue
                watch.event(EngineEvent())
                self._body = piece.body
                if self.stream:
                    yield [piece.body]

    def body(self) -> Mapping[str, Any]:
        return self._body


class Done:
    """An answer that needed no model."""

    stream = False
    most = None
    usage = None
    user = ""

    def __init__(self, model: str, body: Mapping[str, Any]) -> None:
        self.model = model
        self._body = body

    async def chunks(self, origin: Origin, watch: Watch) -> AsyncGenerator[Chunks, None]:
        for chunk in ():
            yield chunk

    def body(self) -> Mapping[str, Any]:
        return self._body


def _most(prepared: Prepared, max_length: int) -> Cost:
    lengths = [len(prompt) for prompt in prepared.prompts]
    limit = prepared.params.max_tokens
    outputs = [max_length - length if limit is None else min(limit, max_length - length) for length in lengths]
    return Cost(sum(lengths), sum(outputs) * prepared.params.num_samples)
