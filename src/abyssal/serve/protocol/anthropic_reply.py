"""Answers of Anthropic's messages API: a message of blocks, or the events of its stream.

A stream's events are ``message_start``, then of each block ``content_block_start``, ``_delta``, ``_stop``, then
``message_delta`` with the reason and ``message_stop``.  A call whose arguments are no JSON object cannot be a
``tool_use`` of a whole message, so there it is text; in a stream its pieces are already out, as the model wrote them.
"""

from __future__ import annotations

import json
from typing import Any

from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.protocol.chat_reply import ChatReply
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.output_delta import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning, ToolCall, collect


class MessagesReply:
    """The way back: feed it every event, and send each stream event; or feed it all, and send the body."""

    def __init__(self, prepared: Prepared, served: ServedModel, id: str) -> None:
        self._prepared = prepared
        self._chat = ChatReply(prepared, served, id, 0)
        self._deltas: list[Delta] = []
        self._last = EngineEvent()
        self._begun = False
        self._block = -1
        self._kind: type[Delta] | None = None
        """Of the open block; None between blocks."""

    @property
    def usage(self) -> Usage:
        """Of the events so far."""
        return self._chat.usage

    def push(self, event: EngineEvent) -> list[dict[str, Any]]:
        """Events of a stream that the event makes.

        Raises:
            ApiError: the request failed.
        """
        deltas = self._chat.deltas(event)
        self._last = event
        self._deltas += deltas
        if not self._prepared.stream:
            return []
        sent = [] if self._begun else [{"type": "message_start", "message": self._message([], None)}]
        self._begun = True
        for delta in deltas:
            sent += self._sent(delta)
        return sent

    def finish(self) -> list[dict[str, Any]]:
        """Events behind the last."""
        called = any(isinstance(delta, CallBegin) for delta in self._deltas)
        delta = {"stop_reason": self._reason(called), "stop_sequence": self._stop_sequence()}
        return [
            *self._closed(),
            {"type": "message_delta", "delta": delta, "usage": usage_body(self.usage)},
            {"type": "message_stop"},
        ]

    def body(self) -> dict[str, Any]:
        """The whole answer, behind the last event."""
        output = collect(self._deltas)
        content: list[dict[str, Any]] = []
        if output.reasoning:
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": ""})
        if output.content:
            content.append({"type": "text", "text": output.content})
        content += map(_call_block, output.calls)
        called = any(block["type"] == "tool_use" for block in content)
        return self._message(content, self._reason(called))

    def _message(self, content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        head = {"id": self._chat.head.id, "type": "message", "role": "assistant", "model": self._prepared.model}
        sequence = self._stop_sequence() if reason is not None else None
        ended = {"stop_reason": reason, "stop_sequence": sequence}
        return {**head, "content": content, **ended, "usage": usage_body(self.usage)}

    def _reason(self, called: bool) -> str:
        if self._last.finish_reason != "stop":
            return "max_tokens"
        if self._stop_sequence() is not None:
            return "stop_sequence"
        return "tool_use" if called else "end_turn"

    def _stop_sequence(self) -> str | None:
        reason = self._last.stop_reason
        return reason if isinstance(reason, str) and self._last.finish_reason == "stop" else None

    def _sent(self, delta: Delta) -> list[dict[str, Any]]:
        match delta:
            case Reasoning(text):
                opened = self._opened(Reasoning, {"type": "thinking", "thinking": "", "signature": ""})
                return [*opened, self._piece({"type": "thinking_delta", "thinking": text})]
            case Content(text):
                opened = self._opened(Content, {"type": "text", "text": ""})
                return [*opened, self._piece({"type": "text_delta", "text": text})]
            case CallBegin(_, id, name):
                closed = self._closed()
                return [*closed, *self._opened(CallBegin, {"type": "tool_use", "id": id, "name": name, "input": {}})]
            case CallArguments(_, text):
                return [self._piece({"type": "input_json_delta", "partial_json": text})]
            case CallEnd():
                return self._closed()

    def _opened(self, kind: type[Delta], block: dict[str, Any]) -> list[dict[str, Any]]:
        """A block of the kind begins, unless one is open."""
        if self._kind is kind:
            return []
        closed = self._closed()
        self._block += 1
        self._kind = kind
        return [*closed, {"type": "content_block_start", "index": self._block, "content_block": block}]

    def _closed(self) -> list[dict[str, Any]]:
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": self._block}]

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}


def usage_body(usage: Usage) -> dict[str, int]:
    """Anthropic's ``usage``, whose ``input_tokens`` are those that no cache had."""
    return {
        "input_tokens": usage.missed_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _call_block(call: ToolCall) -> dict[str, Any]:
    try:
        given = json.loads(call.arguments)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return {"type": "text", "text": f"{call.name}({call.arguments})"}
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}
