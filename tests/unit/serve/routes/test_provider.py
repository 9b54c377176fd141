"""Other providers through LiteLLM: answers, usage, errors, time limits and cancellation, beside a server that stands in
for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Any

import pytest

from abyssal.serve.events import Usage
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.routes.library import load
from abyssal.serve.routes.options import RouteOption
from abyssal.serve.routes.provider import LiteLLMProvider, Patience
from abyssal.serve.routing import Kind, Piece
from abyssal.serve.service import Origin
from tests.support.standin_provider import WORDS, StandIn, standing_in

litellm = pytest.importorskip("litellm")

SECRET, KEY = "a secret prompt", "sk-of-the-operator"
BODY: Mapping[str, Any] = {"model": "house/small", "messages": [{"role": "user", "content": SECRET}]}
COUNTED = Usage(11, 4, 3, 1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in() as other:
        monkeypatch.setenv("OPENAI_API_BASE", other.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield other


def provider(patience: Patience | None = None) -> LiteLLMProvider:
    return LiteLLMProvider(load(), RouteOption("house/", "openai/"), patience)


async def pieces_of(ours: LiteLLMProvider, body: Mapping[str, Any], kind: Kind = "chat") -> list[Piece]:
    routed = ours.prepare(kind, body)
    async with aclosing(ours.run(routed, Origin("req-1"))) as pieces:
        return [piece async for piece in pieces]


def run(body: Mapping[str, Any], kind: Kind = "chat", patience: Patience | None = None) -> list[Piece]:
    async def whole() -> list[Piece]:
        ours = provider(patience)
        try:
            return await pieces_of(ours, body, kind)
        finally:
            await ours.close()

    return asyncio.run(whole())


def refused(body: Mapping[str, Any], patience: Patience | None = None) -> tuple[ApiError, Usage | None]:
    """The error, and the usage that is charged."""
    newest: list[Usage | None] = [None]

    async def whole() -> ApiError:
        ours = provider(patience)
        try:
            async with aclosing(ours.run(ours.prepare("chat", body), Origin("req-1"))) as pieces:
                async for piece in pieces:
                    newest.append(piece.usage)
        except ApiError as error:
            return error
        finally:
            await ours.close()
        raise AssertionError("it was answered")

    return asyncio.run(whole()), newest[-1]


def bodies(pieces: list[Piece]) -> list[Mapping[str, Any]]:
    return [piece.body for piece in pieces if piece.body is not None]


def test_a_whole_answer_has_the_clients_name_and_the_providers_count(stand_in: StandIn) -> None:
    pieces = run({**BODY, "temperature": 0.5})
    (body,) = bodies(pieces)
    assert body["model"] == "house/small" and body["choices"][0]["message"]["content"] == "".join(WORDS)
    assert body["usage"]["prompt_cache_hit_tokens"] == 3 and body["usage"]["total_tokens"] == 15
    assert pieces[-1].usage == COUNTED
    (asked,) = stand_in.requests
    assert asked["model"] == "small" and asked["temperature"] == 0.5 and asked["authorization"] == f"Bearer {KEY}"


def test_a_stream_comes_in_the_providers_pieces_and_counts_meanwhile(stand_in: StandIn) -> None:
    pieces = run({**BODY, "stream": True})
    shown = bodies(pieces)
    assert [body["choices"][0]["delta"].get("content") or "" for body in shown] == ["", *WORDS, ""]
    assert all(body["model"] == "house/small" and "usage" not in body for body in shown)
    counts = [piece.usage.completion_tokens for piece in pieces if piece.usage is not None]
    assert counts[0] == 0 and counts[-2] > counts[2] >= 1 and pieces[-1].usage == COUNTED
    assert stand_in.requests[0]["stream_options"] == {"include_usage": True}


def test_a_stream_ends_with_usage_where_the_client_wants_it(stand_in: StandIn) -> None:
    shown = bodies(run({**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    assert shown[-1]["choices"] == [] and shown[-1]["usage"]["prompt_tokens"] == 11 and shown[-1]["id"] == "x-1"
    assert all(body["usage"] is None for body in shown[:-1])


def test_text_completions_go_to_their_own_path(stand_in: StandIn) -> None:
    (body,) = bodies(run({"model": "house/small", "prompt": SECRET}, "completions"))
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "".join(WORDS)
    shown = bodies(run({"model": "house/small", "prompt": SECRET, "stream": True}, "completions"))
    assert "".join(body["choices"][0]["text"] for body in shown) == "".join(WORDS)
    assert [asked["path"] for asked in stand_in.requests] == ["/v1/completions"] * 2


def test_tools_and_calls_pass_both_ways(stand_in: StandIn) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    stand_in.message = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    history = [*BODY["messages"], stand_in.message, {"role": "tool", "tool_call_id": "call_1", "content": "2"}]
    (body,) = bodies(run({**BODY, "messages": history, "tools": [tool]}))
    message = body["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"] == call["function"]
    assert stand_in.requests[0]["tools"] == [tool] and stand_in.requests[0]["messages"][2]["content"] == "2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "shown", "code"),
    [
        (400, 400, "provider_refused_request"),
        (401, 502, "provider_refused_server"),
        (402, 502, "provider_refused_server"),
        (403, 502, "provider_refused_server"),
        (404, 404, "model_not_found"),
        (413, 413, "provider_refused_request"),
        (422, 422, "provider_refused_request"),
        (429, 429, "provider_rate_limited"),
        (500, 502, "provider_failed"),
        (503, 503, "provider_overloaded"),
        (504, 504, "provider_timeout"),
    ],
)
def test_errors_have_a_status_that_is_true_of_this_server(
    stand_in: StandIn, status: int, shown: int, code: str, stream: bool
) -> None:
    stand_in.status, stand_in.headers = status, {"retry-after": "7"}
    stand_in.error = {"message": f"{KEY} is not good" if status in (401, 500) else "top_p: is wrong", "type": "x"}
    error, charged = refused({**BODY, "stream": stream})
    assert (error.status, error.code) == (shown, code)
    assert error.retry_after == (7 if status in (429, 503) else None)
    assert KEY not in error.message and "litellm" not in error.message.lower()
    assert ("top_p: is wrong" in error.message) == (shown in (400, 413, 422))
    assert charged == Usage(), "nothing was answered, and nothing is charged"
    assert len(stand_in.requests) == 1, "it was tried again"


def test_the_operators_empty_account_is_not_the_clients_rate(stand_in: StandIn) -> None:
    stand_in.status, stand_in.error = 429, {"message": "You exceeded your quota", "code": "insufficient_quota"}
    error, _ = refused(BODY)
    assert (error.status, error.code) == (502, "provider_refused_server")


def test_a_connection_that_breaks_amid_a_stream_is_an_error_and_what_came_is_charged(stand_in: StandIn) -> None:
    stand_in.break_after = 3
    error, charged = refused({**BODY, "stream": True})
    assert (error.status, error.code) == (502, "provider_failed")
    assert charged is not None and charged.prompt_tokens > 0 and charged.completion_tokens >= 1


def test_nobody_there(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    error, charged = refused(BODY)
    assert (error.status, error.code, charged) == (502, "provider_failed", Usage())


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_does_not_answer_is_given_up(stand_in: StandIn, stream: bool) -> None:
    stand_in.pause = 5
    error, _ = refused({**BODY, "stream": stream}, Patience(whole=0.2, first=0.2, next=0.2))
    assert (error.status, error.code) == (504, "provider_timeout")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_providers_work_at_once(stand_in: StandIn, stream: bool) -> None:
    stand_in.pause = 0.05 if stream else 20

    async def leave() -> None:
        ours = provider()
        routed = ours.prepare("chat", {**BODY, "stream": stream})

        async def read() -> None:
            async with aclosing(ours.run(routed, Origin("req-1"))) as pieces:
                async for _ in pieces:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        assert stand_in.requests, "it was not asked yet"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ours.close()

    asyncio.run(leave())
    assert stand_in.gone.wait(3), "the provider works on"


def test_closing_the_generator_between_two_pieces_ends_it_too(stand_in: StandIn) -> None:
    stand_in.pause = 0.05

    async def leave() -> None:
        ours = provider()
        pieces = ours.run(ours.prepare("chat", {**BODY, "stream": True}), Origin("req-1"))
        for _ in range(3):
            await anext(pieces)
        await pieces.aclose()
        await ours.close()

    asyncio.run(leave())
    assert stand_in.gone.wait(3), "the provider works on"


def test_a_parameter_that_the_provider_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    ours = LiteLLMProvider(load(), RouteOption("claude-", "anthropic/claude-"))
    with pytest.raises(ApiError, match="logit_bias") as caught:
        asyncio.run(pieces_of(ours, {**BODY, "model": "claude-x", "logit_bias": {"1": 2}}))
    assert (caught.value.status, caught.value.code) == (422, "unsupported_parameter")
    assert "litellm" not in caught.value.message.lower()


def test_an_unknown_provider_is_an_unknown_model() -> None:
    ours = LiteLLMProvider(load(), RouteOption("x/", "no-such-provider/"))
    with pytest.raises(ApiError) as caught:
        asyncio.run(pieces_of(ours, {**BODY, "model": "x/y"}))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_neither_keys_nor_prompts_are_logged_or_printed(
    stand_in: StandIn, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        run(BODY)
        stand_in.status = 500
        refused({**BODY, "stream": True})
        stand_in.status = 401
        refused(BODY)
    said = caplog.text + "".join(capfd.readouterr())
    fields = [getattr(record, "fields", {}) for record in caplog.records if record.name == "abyssal.serve.routes"]
    assert {"model": "house/small", "status": 401} in fields
    assert SECRET not in said and KEY not in said and "Give Feedback" not in said
