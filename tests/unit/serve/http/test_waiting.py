"""Signs of life while a client waits, and errors before, amid and behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.errors import ApiError
from tests.support.running_app import running
from tests.support.scripted_service import ScriptedService, Step, saying
from tests.support.serving import MODEL, events, served
from tests.unit.serve.http.test_answers import BODIES, body, read_events

Client = Callable[..., httpx.AsyncClient]
STREAMED = {"model": MODEL, "messages": [{"role": "user", "content": "the"}], "stream": True}
CHAT = "/v1/chat/completions"
FAILURE = ApiError(503, "The engine ended", code="engine_unavailable")


def ask(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client:
            return await client.post(path, json=body(path, **fields))

    return asyncio.run(run())


def failing(first: list[Step]) -> Callable[[Any], list[Step]]:
    return lambda prepared: [*first, FAILURE]


def test_a_stream_that_waits_gets_comments(client_of: Client, service: ScriptedService) -> None:
    service.script = saying("the tools", pause=0.05, first=0.12)
    response = ask(client_of(keep_alive_seconds=0.04), CHAT, stream=True)
    blocks = response.text.split("\n\n")
    assert blocks[:2] == [": keep-alive", ": keep-alive"]
    first = next(index for index, block in enumerate(blocks) if block.startswith("data:"))
    assert ": keep-alive" in blocks[first:], "and in long gaps"
    assert read_events(response.text)[-1] == (None, "[DONE]")


def test_a_plain_answer_that_waits_is_led_by_empty_lines(client_of: Client, service: ScriptedService) -> None:
    service.script = saying("the tools", first=0.12)
    response = ask(client_of(keep_alive_seconds=0.04), CHAT)
    assert response.text.startswith("\n\n")
    assert response.text.lstrip("\n").startswith("{")
    assert response.json()["choices"][0]["message"]["content"] == "the tools"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/anthropic/v1/messages"])
def test_an_early_error_has_its_own_status(
    client_of: Client, service: ScriptedService, path: str, stream: bool
) -> None:
    service.script = failing([0.05])
    response = ask(client_of(), path, stream=stream)
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["message"] == "The engine ended"


@pytest.mark.parametrize("path", BODIES)
def test_an_error_amid_a_stream_is_an_event_in_the_api_s_shape(
    client_of: Client, service: ScriptedService, path: str
) -> None:
    service.script = failing([*events(served(), "the tools")[:1]])
    response = ask(client_of(), path, stream=True)
    assert response.status_code == 200
    found = read_events(response.text)
    assert len(found) > 1, "what came before it is there"
    event, data = found[-1]
    if "anthropic" in path:
        assert event == data["type"] == "error"
        assert data["error"] == {"type": "overloaded_error", "message": "The engine ended"}
    elif "responses" in path:
        assert event == data["type"] == "error"
        assert (data["code"], data["sequence_number"]) == ("engine_unavailable", len(found) - 1)
    else:
        assert (event, data["error"]["code"]) == (None, "engine_unavailable")
    assert "[DONE]" not in response.text


def test_an_error_that_the_engine_tells_of_in_an_event(client_of: Client, service: ScriptedService) -> None:
    service.script = lambda prepared: [EngineEvent(error=ApiError(422, "stop: too odd", param="stop"))]
    response = ask(client_of(), CHAT)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "stop")


def test_an_error_behind_empty_lines_breaks_the_answer_off(app_of: Any, service: ScriptedService) -> None:
    service.script = failing([0.1])

    async def run() -> bytes:
        async with running(app_of(keep_alive_seconds=0.03)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            raw = json.dumps({**STREAMED, "stream": False}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
            answer = await reader.read()
            writer.close()
            with pytest.raises(httpx.RemoteProtocolError):
                async with httpx.AsyncClient() as client:
                    await client.post(server.url + CHAT, json={**STREAMED, "stream": False})
            return answer

    answer = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"code":"engine_unavailable"' in answer
    assert not answer.endswith(b"0\r\n\r\n"), "the last chunk would say that it is whole"
