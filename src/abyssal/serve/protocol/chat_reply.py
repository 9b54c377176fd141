"""Answers of the chat API: events in, ``chat.completion.chunk`` or ``chat.completion`` out.

A chunk shows what its event makes certain: ``reasoning_content``, ``content``, a call's beginning, pieces of its
arguments.  Log-probabilities come with the chunk after their tokens' arrival, so none is ahead of its choice and none
is lost; those of reasoning are DeepSeek's ``logprobs.reasoning_content``.
"""

from __future__ import annotations

from typing import Any

from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol import logprobs as shapes
from abyssal.serve.protocol.reply import Reply, finish_reason
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.protocol.usage import usage_body
from abyssal.text.output_delta import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning, collect
from abyssal.text.output_parser import OutputParser

CHUNK, WHOLE = "chat.completion.chunk", "chat.completion"


class _Choice:
    """One choice's text and log-probabilities so far."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.begun = False
        self.calls = False
        self.deltas: list[Delta] = []
        self.scores: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def read(self, event: EngineEvent) -> list[Delta]:
        """What the event makes certain."""
        deltas = self.parser.push(event.text) if event.text else []
        if event.finish_reason is not None:
            deltas = [*deltas, *self.parser.finish()]
        self.calls = self.calls or any(isinstance(delta, CallBegin) for delta in deltas)
        if event.finish_reason is not None:
            self.finish_reason = finish_reason(event.finish_reason, self.calls)
        return deltas


class ChatReply(Reply):
    """The way back: feed it every event, and send each chunk; or feed it all, and send the body."""

    def __init__(self, prepared: Prepared, served: ServedModel, id: str, created: int) -> None:
        super().__init__(prepared, served, id, created)
        assert prepared.parse is not None
        self._choices = [_Choice(prepared.parse(index)) for index in range(prepared.num_choices)]

    def push(self, event: EngineEvent) -> list[dict[str, Any]]:
        """Chunks of a stream that the event makes; none where there is nothing to show yet, or no stream.

        Raises:
            ApiError: the request failed.
        """
        thinking = self.count(event)
        index = self.prepared.choice_of(event)
        choice = self._choices[index]
        deltas = choice.read(event)
        if event.logprobs:
            choice.scores.append(self._scores(event, thinking))
        if not self.prepared.stream:
            choice.deltas += deltas
            return []
        return self._chunks(index, choice, deltas)

    def finish(self) -> list[dict[str, Any]]:
        """Chunks behind the last event."""
        if not self.prepared.include_usage:
            return []
        return [self.head.body(CHUNK, choices=[], usage=usage_body(self.usage))]

    def body(self) -> dict[str, Any]:
        """The whole answer, behind the last event."""
        choices = [
            {
                "index": index,
                "message": {**collect(choice.deltas).message(), "refusal": None},
                "logprobs": self._joined(choice),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self.head.body(WHOLE, choices=choices, usage=usage_body(self.usage))

    def deltas(self, event: EngineEvent) -> list[Delta]:
        """What the event adds to its choice, for protocols that have their own shapes.

        Raises:
            ApiError: the request failed.
        """
        self.count(event)
        return self._choices[self.prepared.choice_of(event)].read(event)

    def _chunks(self, index: int, choice: _Choice, deltas: list[Delta]) -> list[dict[str, Any]]:
        bodies = [] if choice.begun else [{"role": "assistant", "content": ""}]
        bodies += [body for delta in deltas if (body := delta_body(delta)) is not None]
        if not bodies and choice.finish_reason is None:
            return []
        choice.begun = True
        chunks = [self._chunk(index, body) for body in bodies]
        if choice.finish_reason is not None:
            chunks.append(self._chunk(index, {}, choice.finish_reason))
        if choice.scores and (len(bodies) or choice.finish_reason is not None):
            # behind the role alone, where there is more than that
            place = min(len(chunks) - 1, 1 if bodies and "role" in bodies[0] else 0)
            chunks[place]["choices"][0]["logprobs"] = self._joined(choice)
            choice.scores.clear()
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self.head.body(CHUNK, choices=[choice], **self.chunk_usage())

    def _scores(self, event: EngineEvent, thinking: list[bool]) -> dict[str, Any]:
        entries = [shapes.chat_logprob(self.served, entry) for entry in event.logprobs]
        scores: dict[str, Any] = {"content": [], "refusal": None}
        if self.prepared.think is not None:
            scores["reasoning_content"] = [each for each, thought in zip(entries, thinking, strict=True) if thought]
        scores["content"] = [each for each, thought in zip(entries, thinking, strict=True) if not thought]
        return scores

    def _joined(self, choice: _Choice) -> dict[str, Any] | None:
        if self.prepared.params.logprobs is None:
            return None
        return shapes.join([{"content": [], "refusal": None}, *choice.scores])


def delta_body(delta: Delta) -> dict[str, Any] | None:
    """A chunk's ``delta``; None for what a client need not know."""
    match delta:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case CallBegin(index, id, name):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case CallEnd():
            return None
