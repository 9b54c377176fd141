"""What a model's output is made of, as it comes: pieces of reasoning, of content, and of calls to tools.

A :data:`Delta` is what one step of a stream adds; :func:`collect` puts deltas together to a message.  They are OpenAI's
``delta.reasoning_content``, ``delta.content`` and ``delta.tool_calls``, without its JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of an offered tool begins.  It will not be taken back."""

    index: int
    """0 for the first call of the output."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, exactly as the model wrote them."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """No more arguments come."""

    index: int
    complete: bool
    """False where the output ended before the call did."""


Delta = Reasoning | Content | CallBegin | CallArguments | CallEnd


@dataclass(frozen=True)
class ToolCall:
    """A call as a whole."""

    id: str
    name: str
    arguments: str
    """Verbatim; JSON if the model wrote JSON."""
    complete: bool = True
    """Whether the model ended it."""


@dataclass(frozen=True)
class ParsedOutput:
    """An output as a whole."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = field(default=())

    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI's format, with DeepSeek's ``reasoning_content``."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours of one kind as one."""
    merged: list[Delta] = []
    run: list[str] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if _continues(last, delta):
            run.append(delta.text)  # pyright: ignore[reportAttributeAccessIssue]
            continue
        _close(merged, run)
        merged.append(delta)
        run = []
    _close(merged, run)
    return merged


def collect(deltas: Iterable[Delta]) -> ParsedOutput:
    """All deltas of an output, put together."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[tuple[CallBegin, list[str], bool]] = []
    for delta in deltas:
        match delta:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallBegin(index):
                assert index == len(calls), delta
                calls.append((delta, [], False))
            case CallArguments(index, text):
                calls[index][1].append(text)
            case CallEnd(index, complete):
                begin, arguments, _ = calls[index]
                calls[index] = (begin, arguments, complete)
    return ParsedOutput(
        "".join(reasoning),
        "".join(content),
        tuple(ToolCall(begin.id, begin.name, "".join(texts), complete) for begin, texts, complete in calls),
    )


def _continues(last: Delta | None, delta: Delta) -> bool:
    if isinstance(delta, CallArguments):
        return isinstance(last, CallArguments) and last.index == delta.index
    return isinstance(delta, Reasoning | Content) and type(last) is type(delta)


def _close(merged: list[Delta], run: list[str]) -> None:
    """Add the texts of a run to the delta that began it."""
    if run:
        first = merged[-1]
        assert isinstance(first, Reasoning | Content | CallArguments)
        merged[-1] = replace(first, text="".join([first.text, *run]))
