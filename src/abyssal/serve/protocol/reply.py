"""What every answer has: its head, why choices ended, and usage counted from the events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abyssal.engine.messages import FinishReason
from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.protocol.usage import UsageCounter, usage_body

_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "prefilled": "length",
    "deadline": "insufficient_system_resource",
    "cancelled": "insufficient_system_resource",
}


@dataclass(frozen=True)
class Head:
    """What each chunk of an answer repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str = ""

    def body(self, kind: str, **fields: Any) -> dict[str, Any]:
        """A body of this kind (``chat.completion``)."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint or None, **fields}


class Reply:
    """Part of an answer that all protocols share: they feed it every event, in order."""

    def __init__(self, prepared: Prepared, served: ServedModel, id: str, created: int) -> None:
        self.prepared = prepared
        self.served = served
        self.head = Head(id, created, prepared.model, served.fingerprint)
        self._counter = UsageCounter(prepared)

    @property
    def usage(self) -> Usage:
        """Of the events so far; of a cancelled request, what was done of it."""
        return self._counter.usage

    def chunk_usage(self) -> dict[str, Any]:
        """A chunk's own ``usage``, which is null before the last chunk unless it was asked for with each."""
        if not self.prepared.include_usage:
            return {}
        return {"usage": usage_body(self.usage) if self.prepared.continuous_usage else None}

    def count(self, event: EngineEvent) -> list[bool]:
        """Of each token of the event, whether it is reasoning.

        Raises:
            ApiError: the event's.
        """
        if event.error is not None:
            raise event.error
        if event.finish_reason == "error":
            raise ApiError(500, "The engine could not go on with this request")
        return self._counter.push(event)


def finish_reason(reason: FinishReason | None, calls: bool = False) -> str | None:
    """OpenAI's word, or DeepSeek's ``insufficient_system_resource`` for what the server cut short.

    Args:
        calls: whether the choice called tools.
    """
    if reason is None:
        return None
    return "tool_calls" if calls and reason == "stop" else _REASONS[reason]
