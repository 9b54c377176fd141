"""Answers of the responses API: a response of items, or the events of its stream.

The items are reasoning, a message, and calls, in the order in which the model wrote them.  Each has a number in the
output; a stream tells of an item when it begins (``response.output_item.added``), of its pieces, and of it as a whole
when it ends (``response.output_item.done``), and the response itself comes first and last.
"""

from __future__ import annotations

from typing import Any

from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.protocol.chat_reply import ChatReply
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.output_delta import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponsesReply:
    """The way back: feed it every event, and send each stream event; or feed it all, and send the body."""

    def __init__(self, prepared: Prepared, served: ServedModel, id: str, created: int) -> None:
        self._prepared = prepared
        self._chat = ChatReply(prepared, served, id, created)
        self._items: list[dict[str, Any]] = []
        """Ended ones; the open one is the last while ``_texts`` is not None."""
        self._texts: list[str] | None = None
        self._last = EngineEvent()
        self._sent: list[dict[str, Any]] = []
        self._numbered = 0

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
        if self._numbered == 0:
            self._send("response.created", response=self._response("in_progress"))
            self._send("response.in_progress", response=self._response("in_progress"))
        self._last = event
        for delta in deltas:
            self._read(delta)
        return self._taken()

    def finish(self) -> list[dict[str, Any]]:
        """Events behind the last."""
        self._close()
        response = self.body()
        self._send(f"response.{response['status']}", response=response)
        return self._taken()

    def body(self) -> dict[str, Any]:
        """The whole answer, behind the last event."""
        self._close()
        return self._response("completed" if self._last.finish_reason == "stop" else "incomplete")

    def _taken(self) -> list[dict[str, Any]]:
        sent, self._sent = self._sent, []
        return sent if self._prepared.stream else []

    def _send(self, type: str, **fields: Any) -> None:
        self._sent.append({"type": type, "sequence_number": self._numbered, **fields})
        self._numbered += 1

    def _read(self, delta: Delta) -> None:
        match delta:
            case Reasoning(text):
                self._text("reasoning", text)
            case Content(text):
                self._text("message", text)
            case CallBegin(_, id, name):
                self._open({"type": "function_call", "call_id": id, "name": name, "arguments": ""})
            case CallArguments(_, text):
                self._piece("response.function_call_arguments.delta", text)
            case CallEnd():
                self._close()

    def _text(self, kind: str, text: str) -> None:
        if self._texts is None or self._items[-1]["type"] != kind:
            own = {"role": "assistant"} if kind == "message" else {"summary": []}
            self._open({"type": kind, **own, "content": []})
            self._send("response.content_part.added", **self._place(), content_index=0, part=_part(kind, ""))
        self._piece(f"response.{_PARTS[kind]}.delta", text)

    def _open(self, item: dict[str, Any]) -> None:
        self._close()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        number = len(self._items)
        identity = {"id": f"{prefix}_{self._chat.head.id.removeprefix('resp_')}_{number}", "status": "in_progress"}
        self._items.append({**item, **identity})
        self._texts = []
        self._send("response.output_item.added", output_index=number, item=self._items[-1])

    def _piece(self, type: str, text: str) -> None:
        assert self._texts is not None
        self._texts.append(text)
        place = self._place() if self._items[-1]["type"] == "function_call" else {**self._place(), "content_index": 0}
        logprobs = {"logprobs": []} if type == "response.output_text.delta" else {}
        self._send(type, **place, delta=text, **logprobs)

    def _close(self) -> None:
        """End the open item, if there is one."""
        if self._texts is None:
            return
        text, self._texts = "".join(self._texts), None
        item = self._items[-1]
        kind, place = item["type"], self._place()
        ended = self._last.finish_reason in (None, "stop")
        whole = {**item, "status": "completed" if ended else "incomplete"}
        if kind == "function_call":
            whole["arguments"] = text
            done = {"arguments": text, "name": item["name"]}
            self._send("response.function_call_arguments.done", **place, **done)
        else:
            whole["content"] = [_part(kind, text)]
            logprobs = {"logprobs": []} if kind == "message" else {}
            self._send(f"response.{_PARTS[kind]}.done", **place, content_index=0, text=text, **logprobs)
            self._send("response.content_part.done", **place, content_index=0, part=_part(kind, text))
        self._items[-1] = whole
        self._send("response.output_item.done", output_index=place["output_index"], item=whole)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _response(self, status: str) -> dict[str, Any]:
        cut = "max_output_tokens" if self._last.finish_reason in ("length", "prefilled") else "server_resources"
        head = self._chat.head
        return {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": cut} if status == "incomplete" else None,
            "model": head.model,
            "output": [] if status == "in_progress" else list(self._items),
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self._prepared.repeated,
            "usage": None if status == "in_progress" else usage_body(self.usage),
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    """The responses API's ``usage``."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    others = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": _PARTS[kind], "text": text, **others}
