"""How each API writes its answers and errors as bytes: bodies of JSON, and server-sent events.

=========  ============================  ================================================  ====================
dialect    an event                      an error in a stream                              a stream's end
=========  ============================  ================================================  ====================
openai     ``data: {...}``               ``data: {"error": {...}}``                        ``data: [DONE]``
responses  ``event: TYPE``, ``data:``    ``event: error`` with code, message and param
anthropic  ``event: TYPE``, ``data:``    ``event: error`` with Anthropic's body
=========  ============================  ================================================  ====================

A stream that was broken off has no ``[DONE]``, or whatever its API ends with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from abyssal.serve.protocol.errors import ApiError

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it."""
EMPTY_LINE = b"\n"
"""Before a plain answer: JSON may be led by it."""
STREAM_TYPE = "text/event-stream; charset=utf-8"
JSON_TYPE = "application/json"

Name = Literal["openai", "responses", "anthropic"]


def encode(body: Mapping[str, Any]) -> bytes:
    """As JSON."""
    return msgspec.json.encode(body)


class Dialect:
    """One of them."""

    def __init__(self, name: Name) -> None:
        self.name = name
        self.done = b"data: [DONE]\n\n" if name == "openai" else b""
        """Behind a stream's last event."""

    def event(self, body: Mapping[str, Any]) -> bytes:
        """One of a stream."""
        if self.name == "openai":
            return b"data: %b\n\n" % encode(body)
        return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), encode(body))

    def error(self, error: ApiError) -> dict[str, Any]:
        """A body."""
        return error.anthropic() if self.name == "anthropic" else error.openai()

    def error_event(self, error: ApiError, number: int) -> bytes:
        """In a stream.

        Args:
            number: of events before it.
        """
        body = self.error(error)
        if self.name == "responses":
            shown = {"code": error.code or error.type, "message": error.message, "param": error.param}
            body = {"type": "error", "sequence_number": number, **shown}
        return self.event(body)


OPENAI, RESPONSES, ANTHROPIC = Dialect("openai"), Dialect("responses"), Dialect("anthropic")


def dialect_of(path: str) -> Dialect:
    """Of an error at ``path``."""
    return ANTHROPIC if path.startswith("/anthropic/") else OPENAI
