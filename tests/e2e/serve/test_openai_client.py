"""OpenAI's official client against the real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel, Field

from tests.support.live_server import LiveServer

CODE: Any = [{"role": "user", "content": "def decode(self, text):"}]
ASK: Any = [{"role": "user", "content": "how is the weather in Paris?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place, now.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
MOST = 1500
"""Tokens of a form: a model without sense may put many spaces into it."""
CHOICE: Any = {"type": "function", "function": {"name": "weather"}}


class Colour(BaseModel):
    """Short, so that a model without sense ends soon."""

    name: str = Field(max_length=6)
    red: bool
    shade: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=server.api, api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def family(family_server: LiveServer) -> OpenAI:
    return OpenAI(base_url=family_server.api, api_key="any", max_retries=0, timeout=60)


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["trained"]
    assert client.models.retrieve("trained").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_stream_says_what_the_plain_answer_says_and_counts_alike(client: OpenAI) -> None:
    ask: Any = {"model": "trained", "messages": CODE, "max_tokens": 40, "temperature": 0}
    plain = client.chat.completions.create(**ask)
    chunks = [*client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain.choices[0].message.content == text and len(chunks) > 10
    assert chunks[-1].usage is not None and plain.usage is not None
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == plain.choices[0].finish_reason and set(reasons[:-1]) == {None}


def test_a_prefix_seen_before_is_a_hit_in_every_field_of_usage(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "import json, email, http, logging\n" * 12}]
    ask: Any = {"model": "trained", "messages": long, "max_tokens": 2, "temperature": 0}
    client.chat.completions.create(**ask)
    usage: Any = client.chat.completions.create(**ask).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached >= 64 and cached % 64 == 0
    assert usage.prompt_cache_hit_tokens == cached
    assert usage.prompt_cache_miss_tokens == usage.prompt_tokens - cached


def test_many_at_once_through_the_async_client(server: LiveServer) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        prompt = f"class Number{number}:\n"
        stream = await client.completions.create(
            model="trained", prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=server.api, api_key="any", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(12)))
            alone = [await ask(client, number) for number in range(12)]
        assert together == alone, "an answer depends on what runs beside it"
        return together

    assert all(asyncio.run(all_of_them()))


def test_n_choices_a_seed_and_stops(client: OpenAI) -> None:
    ask: Any = {"model": "trained", "messages": CODE, "max_tokens": 12, "n": 3, "seed": 11, "temperature": 1.0}
    first, again = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    stopped = client.completions.create(model="trained", prompt="import os\n", max_tokens=60, temperature=0, stop="\n")
    assert "\n" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"


def test_logprobs_of_chat_are_of_the_tokens_shown(client: OpenAI) -> None:
    done = client.chat.completions.create(
        model="trained", messages=CODE, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    scores = done.choices[0].logprobs
    assert scores is not None and scores.content is not None and done.usage is not None
    assert len(scores.content) == done.usage.completion_tokens
    for entry in scores.content:
        assert entry.token == entry.top_logprobs[0].token, "greedy takes the likeliest"
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0 and len(entry.top_logprobs) == 3


def test_completions_echo_scores_of_the_prompt(client: OpenAI) -> None:
    done = client.completions.create(model="trained", prompt="import os", max_tokens=0, echo=True, logprobs=1)
    (choice,) = done.choices
    assert choice.text == "import os" and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert done.usage is not None and done.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called_with_arguments_of_its_schema(family: OpenAI, stream: bool) -> None:
    ask: Any = {"model": "family", "messages": ASK, "tools": [WEATHER], "tool_choice": CHOICE, "max_tokens": MOST}
    if stream:
        with family.chat.completions.stream(**ask) as events:
            for _ in events:
                pass
            done = events.get_final_completion()
    else:
        done = family.chat.completions.create(**ask)
    (choice,) = done.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call: Any = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and set(arguments) == {"place", "days"} and arguments["days"] in (1, 2, 3)
    assert call.id.startswith("call_")


def test_calls_and_their_results_are_accepted_back(family: OpenAI) -> None:
    first = family.chat.completions.create(
        model="family", messages=ASK, tools=[WEATHER], tool_choice=CHOICE, max_tokens=MOST
    )
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    history: Any = [*ASK, message, result]
    second = family.chat.completions.create(model="family", messages=history, tools=[WEATHER], max_tokens=5)
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_structured_output_parses_into_the_pydantic_model(family: OpenAI) -> None:
    done = family.chat.completions.parse(model="family", messages=ASK, response_format=Colour, max_tokens=MOST)
    parsed = done.choices[0].message.parsed
    assert isinstance(parsed, Colour) and 0 <= parsed.shade <= 9 and done.choices[0].finish_reason == "stop"


def test_structured_output_cut_short_is_the_clients_own_error(family: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        family.chat.completions.parse(model="family", messages=ASK, response_format=Colour, max_tokens=3)


def test_structured_output_works_in_the_plain_format_too(client: OpenAI) -> None:
    done = client.chat.completions.parse(model="trained", messages=CODE, response_format=Colour, max_tokens=900)
    assert isinstance(done.choices[0].message.parsed, Colour)


def test_reasoning_is_told_from_the_answer_and_counted(family: OpenAI) -> None:
    ask: Any = {
        "model": "family",
        "messages": ASK,
        "max_tokens": 24,
        "seed": 1,
        "extra_body": {"thinking": {"type": "enabled"}},
    }
    plain: Any = family.chat.completions.create(**ask)
    message = plain.choices[0].message
    assert message.reasoning_content and not message.content, "it is still thinking after 24 tokens"
    assert plain.usage.completion_tokens_details.reasoning_tokens == 24
    chunks = [*family.chat.completions.create(**ask, stream=True)]
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content


def test_responses_plain_and_streamed(client: OpenAI) -> None:
    ask: Any = {"model": "trained", "input": "import os", "max_output_tokens": 16, "temperature": 0}
    plain = client.responses.create(**ask)
    assert plain.output_text and plain.status in ("completed", "incomplete") and plain.usage is not None
    events: list[Any] = [*client.responses.create(**ask, stream=True)]
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = events[-1]
    assert final.type == f"response.{plain.status}"
    assert "".join(texts) == plain.output_text == final.response.output_text
    assert final.response.usage.total_tokens == plain.usage.total_tokens
    assert [event.sequence_number for event in events] == [*range(len(events))]


def test_responses_parse_into_the_pydantic_model(family: OpenAI) -> None:
    done = family.responses.parse(model="family", input="a colour", text_format=Colour, max_output_tokens=MOST)
    assert isinstance(done.output_parsed, Colour) and done.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_tools(family: OpenAI, stream: bool) -> None:
    function: Any = WEATHER["function"]
    tool: Any = {"type": "function", "strict": True, **function}
    ask: Any = {"model": "family", "input": "the weather?", "tools": [tool], "max_output_tokens": MOST}
    ask["tool_choice"] = {"type": "function", "name": "weather"}
    if stream:
        with family.responses.stream(**ask) as events:
            pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
            done: Any = events.get_final_response()
    else:
        done = family.responses.create(**ask)
        pieces = []
    (call,) = [item for item in done.output if item.type == "function_call"]
    assert call.name == "weather" and set(json.loads(call.arguments)) == {"place", "days"}
    assert not stream or "".join(pieces) == call.arguments


@pytest.mark.parametrize(
    ("change", "expected", "status", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, 404, "model"),
        ({"temperature": 9}, openai.UnprocessableEntityError, 422, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, 400, None),
        ({"extra_body": {"colour": "red"}}, openai.UnprocessableEntityError, 422, "colour"),
        ({"messages": []}, openai.UnprocessableEntityError, 422, "messages"),
        ({"reasoning_effort": "high"}, openai.UnprocessableEntityError, 422, "reasoning_effort"),
    ],
)
def test_errors_are_the_clients_own_exceptions(
    client: OpenAI, change: dict[str, Any], expected: type[openai.APIStatusError], status: int, param: str | None
) -> None:
    ask: Any = {"model": "trained", "messages": CODE, **change}
    with pytest.raises(expected) as caught:
        client.chat.completions.create(**ask)
    error = caught.value
    assert error.status_code == status and error.type and error.request_id
    assert param is None or error.param == param


def test_an_unknown_path_is_the_clients_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="trained", input="x")
