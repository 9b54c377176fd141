"""What all request schemas have in common."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from abyssal.serve.http.tokens import DetokenizeRequest
from abyssal.serve.protocol.anthropic import MessagesRequest
from abyssal.serve.protocol.chat import ChatRequest
from abyssal.serve.protocol.common import Named, read
from abyssal.serve.protocol.errors import ApiError, of_validation
from abyssal.serve.protocol.responses import ResponsesRequest
from tests.support.serving import MODEL, served

MANY = 20_000
CHAT = {"messages": [{"role": "user", "content": "the"}]}


def many(value: object, name: str = "{}") -> dict[str, object]:
    return {name.format(number): value for number in range(MANY)}


@pytest.mark.parametrize(
    ("schema", "fields", "param"),
    [
        (ChatRequest, {"messages": [[]] * MANY}, "messages[0]"),
        (ChatRequest, {**CHAT, "tools": [1] * MANY}, "tools[0]"),
        (ChatRequest, {**CHAT, "stop": [1] * MANY}, "stop"),
        (ChatRequest, {**CHAT, "stop_token_ids": ["x"] * MANY}, "stop_token_ids[0]"),
        (ChatRequest, {**CHAT, "logit_bias": many("x")}, "logit_bias"),
        (ChatRequest, {**CHAT, **many(1, "k{}")}, "k0"),
        (ChatRequest, {**CHAT, "thinking": many(1, "k{}")}, "thinking"),
        (ResponsesRequest, {"input": [1] * MANY}, "input"),
        (ResponsesRequest, {"input": "x", "tools": [1] * MANY}, "tools[0]"),
        (MessagesRequest, {"max_tokens": 1, "messages": [1] * MANY}, "messages[0]"),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": [1] * MANY}]}, "messages[0]"),
        (MessagesRequest, {"max_tokens": 1, "messages": [], "stop_sequences": [1] * MANY}, "messages"),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}, "tokens[0]"),
    ],
)
def test_of_many_mistakes_few_are_gathered(
    monkeypatch: pytest.MonkeyPatch, schema: type[Named], fields: dict[str, Any], param: str
) -> None:
    """A body has room for millions, and to gather them all would hold up the event loop for seconds."""
    gathered = [0]

    def counted(error: ValidationError) -> ApiError:
        gathered.append(error.error_count())
        return of_validation(error)

    monkeypatch.setattr("abyssal.serve.protocol.common.of_validation", counted)
    with pytest.raises(ApiError) as caught:
        read(schema, {"model": MODEL, **fields}, {}, served())
    assert caught.value.status == 422 and (caught.value.param or "").startswith(param)
    assert max(gathered) <= 3
