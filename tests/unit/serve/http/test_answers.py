"""Every API, plain and streamed, over a scripted service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.serving import MODEL

Client = Callable[..., httpx.AsyncClient]
MESSAGES = [{"role": "user", "content": "the tools"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "the"},
    "/completions": {"prompt": "the"},
    "/v1/responses": {"input": "the tools"},
    "/beta/chat/completions": {"messages": [*MESSAGES, {"role": "assistant", "content": "the", "prefix": True}]},
    "/beta/completions": {"prompt": "the", "suffix": "tools"},
    "/anthropic/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}


def body(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, **BODIES[path], **fields}


def read_events(text: str) -> list[tuple[str | None, Any]]:
    """(event, data) of a stream; data that is no JSON is left as it is."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            found.append((lines.get("event"), json.loads(data) if data.startswith("{") else data))
    return found


def said(answer: dict[str, Any]) -> str:
    if "choices" in answer:
        choice = answer["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    return answer["content"][0]["text"]


@pytest.mark.parametrize("path", BODIES)
def test_a_plain_answer(client_of: Client, path: str) -> None:
    async def ask() -> httpx.Response:
        async with client_of() as client:
            return await client.post(path, json=body(path))

    response = asyncio.run(ask())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert said(response.json()) == "the tools"


@pytest.mark.parametrize("path", BODIES)
def test_a_stream(client_of: Client, path: str) -> None:
    async def ask() -> httpx.Response:
        async with client_of() as client:
            return await client.post(path, json=body(path, stream=True))

    response = asyncio.run(ask())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = read_events(response.text)
    text = "".join(map(_piece, (data for _, data in found if isinstance(data, dict))))
    assert text == "the tools"
    if "anthropic" in path:
        assert found[-1][0] == found[-1][1]["type"] == "message_stop"
    elif "responses" in path:
        assert found[-1][0] == "response.completed"
        assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    else:
        assert found[-1] == (None, "[DONE]")


def _piece(data: dict[str, Any]) -> str:
    if "choices" in data:
        choice = data["choices"][0]
        return choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    if data["type"] == "response.output_text.delta":
        return data["delta"]
    return data["delta"]["text"] if data["type"] == "content_block_delta" else ""


def test_a_stream_ends_with_usage_where_asked(client_of: Client) -> None:
    async def ask() -> httpx.Response:
        async with client_of() as client:
            path = "/v1/chat/completions"
            return await client.post(path, json=body(path, stream=True, stream_options={"include_usage": True}))

    *_, (_, last), done = read_events(asyncio.run(ask()).text)
    assert done == (None, "[DONE]")
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
