"""Anthropic's official client against the real server."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.support.live_server import LiveServer

CODE: Any = [{"role": "user", "content": "def decode(self, text):"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Of a place, now.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
        "required": ["place", "days"],
        "additionalProperties": False,
    },
}
MOST = 1500
"""Tokens of a call: a model without sense may put many spaces into it."""
GREEDY: Any = {"temperature": 0}
"""The client has no argument for it any more."""
FORCED: Any = {"type": "tool", "name": "weather"}


def base_url(server: LiveServer) -> str:
    return f"{server.url}/anthropic"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Anthropic:
    return Anthropic(base_url=base_url(server), api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def family(family_server: LiveServer) -> Anthropic:
    return Anthropic(base_url=base_url(family_server), api_key="any", max_retries=0, timeout=60)


def test_a_stream_says_what_the_plain_message_says(client: Anthropic) -> None:
    ask: Any = {"model": "trained", "messages": CODE, "max_tokens": 24, "system": "You write code."}
    ask |= {"extra_body": GREEDY}
    plain: Any = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final: Any = stream.get_final_message()
    assert text == plain.content[0].text == final.content[0].text and text
    assert plain.role == "assistant" and plain.stop_reason == final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == plain.usage.output_tokens == 24
    seen = plain.usage.input_tokens + (plain.usage.cache_read_input_tokens or 0)
    assert seen == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 0


def test_stop_sequences_are_named(client: Anthropic) -> None:
    ask: Any = {"model": "trained", "messages": CODE, "max_tokens": 30, "extra_body": GREEDY}
    whole: Any = client.messages.create(**ask)
    stop = whole.content[0].text[10:14]
    done: Any = client.messages.create(**ask, stop_sequences=["never said", stop])
    assert done.stop_reason == "stop_sequence" and done.stop_sequence == stop
    assert whole.content[0].text.partition(stop)[0] == done.content[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_used_and_its_result_is_accepted_back(family: Anthropic, stream: bool) -> None:
    ask: Any = {"model": "family", "messages": CODE, "max_tokens": MOST, "tools": [WEATHER], "tool_choice": FORCED}
    if stream:
        with family.messages.stream(**ask) as events:
            done = events.get_final_message()
    else:
        done = family.messages.create(**ask)
    (use,) = [block for block in done.content if block.type == "tool_use"]
    arguments: Any = use.input
    assert done.stop_reason == "tool_use" and use.name == "weather" and arguments["days"] in (1, 2, 3)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    history: Any = [*CODE, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    again = family.messages.create(model="family", messages=history, max_tokens=5, tools=[WEATHER])
    assert again.usage.output_tokens <= 5


async def _ask_async(server: LiveServer) -> Any:
    async with AsyncAnthropic(base_url=base_url(server), api_key="any", max_retries=0) as client:
        return await client.messages.create(model="trained", messages=CODE, max_tokens=4, extra_body=GREEDY)


def test_the_async_client(server: LiveServer) -> None:
    assert asyncio.run(_ask_async(server)).content[0].text


@pytest.mark.parametrize(
    ("change", "expected", "kind"),
    [
        ({"model": "claude"}, anthropic.NotFoundError, "not_found_error"),
        ({"max_tokens": 0}, anthropic.UnprocessableEntityError, "invalid_request_error"),
        ({"max_tokens": 100_000}, anthropic.BadRequestError, "invalid_request_error"),
        ({"metadata": {"colour": "red"}}, anthropic.UnprocessableEntityError, "invalid_request_error"),
    ],
)
def test_errors_are_the_clients_own_exceptions(
    client: Anthropic, change: dict[str, Any], expected: type[anthropic.APIStatusError], kind: str
) -> None:
    ask: Any = {"model": "trained", "messages": CODE, "max_tokens": 4, **change}
    with pytest.raises(expected) as caught:
        client.messages.create(**ask)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == kind and body["error"]["message"]
