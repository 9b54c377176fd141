"""Who watches requests: metrics, logs and traces, told by the front and never asked.

    watch = observer.begin(arrival)      the request's head is read, its key is known
    watch.prepared(prepared, origin)     its prompt is made; unless it is refused before, or routed
    watch.event(event)                   something of the answer came; the first is the first token
    watch.end(outcome)                   once, whatever became of it

All are called on the event loop, between two tokens of somebody: they return at once, and raise nothing.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.service import Origin

Told = TypeVar("Told")

log = logging.getLogger("abyssal.serve")


@dataclass(frozen=True)
class Arrival:
    """A request as it came."""

    request_id: str
    endpoint: str
    """The route, such as ``/v1/chat/completions``: one of few, whatever the client wrote."""
    at: float
    """When, by the monotonic clock."""
    key_name: str = ""
    """Of the API key; empty on an open server."""
    traceparent: str | None = None
    """The caller's own trace, as W3C's header of that name has it."""
    tracestate: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    status: int
    """Of the HTTP response; 499 where the client left before there was one."""
    disconnected: bool = False
    """The client left before the answer was complete."""
    error: str = ""
    """``ApiError.code`` of what went wrong, or its type where it has none, before or amid the answer; else empty."""
    model: str = ""
    """Empty where it is not known."""
    stream: bool = False
    usage: Usage | None = None
    """What was charged; None where nothing was computed."""
    cost: int = 0
    """Billionths of the currency; 0 without prices."""
    saved: int = 0
    """Billionths that hits in the context cache saved."""


class Watch(Protocol):
    """Of one request."""

    def prepared(self, prepared: Prepared, origin: Origin) -> None: ...

    def event(self, event: EngineEvent) -> None:
        """Of a routed request: an empty one for each piece of its answer."""
        ...

    def end(self, outcome: Outcome) -> None: ...


class Observer(Protocol):
    """Of all requests for an answer of a model (not of pages, metrics and the like)."""

    def begin(self, arrival: Arrival) -> Watch: ...


class Watches:
    """Several as one.  What one of them raises is logged, and neither the request nor the others notice."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches

    def prepared(self, prepared: Prepared, origin: Origin) -> None:
        for watch in self._watches:
            _tell(watch.prepared, prepared, origin)

    def event(self, event: EngineEvent) -> None:
        for watch in self._watches:
            _tell(watch.event, event)

    def end(self, outcome: Outcome) -> None:
        for watch in self._watches:
            _tell(watch.end, outcome)


class Observers:
    """Several as one; none is nobody."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = observers

    def begin(self, arrival: Arrival) -> Watches:
        watches = [_tell(observer.begin, arrival) for observer in self._observers]
        return Watches([watch for watch in watches if watch is not None])


def _tell(told: Callable[..., Told], *news: Any) -> Told | None:
    try:
        return told(*news)
    except Exception as error:
        frames = "".join(traceback.format_tb(error.__traceback__))  # what it says may quote the request
        log.error("an observer failed\n%s%s", frames, type(error).__name__)
        return None
