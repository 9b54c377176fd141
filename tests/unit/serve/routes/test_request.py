"""What a client's body may hold that goes to another provider, and about what it may cost."""

from __future__ import annotations

from typing import Any

import pytest

from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.routes.request import UNLIMITED_TOKENS, checked, most_output_tokens, prompt_tokens

MESSAGES = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"model": "openai/gpt-4o", "messages": MESSAGES}


def parts(*each: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(each)}]


@pytest.mark.parametrize(
    "name", ["api_base", "base_url", "api_key", "extra_headers", "metadata", "fallbacks", "mock_response", "caching"]
)
def test_what_would_steer_litellm_itself_is_refused_by_name(name: str) -> None:
    with pytest.raises(ApiError, match=name) as caught:
        checked("chat", {**BODY, name: "http://elsewhere.example"})
    assert (caught.value.status, caught.value.param, caught.value.code) == (422, name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": parts("text")}, "messages[0].content[0]"),
        ({"messages": parts({"type": "file", "file": {"file_id": "http://x"}})}, "messages[0].content[0]"),
        (
            {"messages": parts({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}})},
            "messages[0].content[0].image_url",
        ),
        ({"tools": [{"type": "mcp", "server_url": "http://inside/"}]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"user": "half of a pair \ud800"}, "user"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked("chat", {**BODY, **change})
    assert (caught.value.status, caught.value.param) == (422, param)


@pytest.mark.parametrize("name", [None, 5, "gemini/../../admin", "a b", "x" * 300, "gpt\n4", "openai/é"])
def test_names_that_are_none_are_unknown_models(name: object) -> None:
    with pytest.raises(ApiError) as caught:
        checked("chat", {**BODY, "model": name})
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_null_is_absent_and_pictures_may_come_along() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = parts({"type": "text", "text": "what is it?"}, picture)
    assert checked("chat", {**BODY, "messages": messages, "seed": None}) == {**BODY, "messages": messages}


def test_a_text_completion_needs_a_prompt() -> None:
    with pytest.raises(ApiError) as caught:
        checked("completions", {"model": "openai/x", "prompt": ""})
    assert caught.value.param == "prompt"


def test_estimates_grow_with_what_is_asked() -> None:
    short = prompt_tokens("chat", BODY)
    assert 1 < short < 30
    assert prompt_tokens("chat", {**BODY, "messages": MESSAGES * 10}) == 10 * short
    assert prompt_tokens("chat", {**BODY, "tools": [{"description": "x" * 400}]}) >= short + 100
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert 1000 < prompt_tokens("chat", {**BODY, "messages": parts(picture)}) < 1100
    assert prompt_tokens("completions", {"prompt": [1, 2, 3]}) == 3


def test_output_is_limited_by_what_is_asked_for() -> None:
    assert most_output_tokens(BODY) == UNLIMITED_TOKENS
    assert most_output_tokens({"max_tokens": 5, "n": 3}) == 15
    assert most_output_tokens({"max_completion_tokens": 7}) == 7
    assert most_output_tokens({"prompt": ["a", "b"], "max_tokens": 5, "best_of": 2}) == 20
    assert most_output_tokens({"prompt": [1, 2], "max_tokens": 5}) == 5
