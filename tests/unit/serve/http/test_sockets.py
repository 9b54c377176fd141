"""What needs a connection: clients that leave, that are slow, or that speak no HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from abyssal.serve.events import EngineEvent
from abyssal.serve.http import connection
from abyssal.serve.http.connection import Connection
from tests.support.running_app import Running, running
from tests.support.scripted_service import ScriptedService, saying
from tests.support.serving import MODEL

App = Callable[..., Any]
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "the"}]}
RAW = json.dumps(BODY).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def until(true: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


async def talk(server: Running, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that the server says to these bytes, until it ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    heard = bytearray()

    async def hear() -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                heard.extend(chunk)

    hearing = asyncio.create_task(hear())
    with suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
    await asyncio.wait_for(hearing, 5)
    writer.close()
    return bytes(heard)


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, raw = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head
    return int(head.split(b" ")[1]), json.loads(raw)["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_its_request_at_once(
    app_of: App, service: ScriptedService, desk: Desk, store: Store, stream: bool, begun: bool
) -> None:
    service.script = saying("the tools " * 50, pause=0.01, first=0.0 if begun else 5.0)
    key = desk.keys.create("alice")

    async def run() -> float:
        async with running(app_of(desk=desk)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            raw = json.dumps({**BODY, "stream": stream}).encode()
            writer.write(HEAD + f"authorization: Bearer {key}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
            if begun and stream:
                await reader.readuntil(b"data: ")
            await until(lambda: service.running == 1)
            await asyncio.sleep(0.1)
            left = time.monotonic()
            writer.close()
            await until(lambda: service.running == 0)
            took = time.monotonic() - left
            await until(lambda: server.front.gate.running == 0)
            return took

    assert asyncio.run(run()) < 0.5
    assert service.ran[0].cancelled
    charged = store.rows("SELECT output_tokens, miss_tokens FROM log")
    assert bool(charged) == begun
    if begun:
        assert 1 <= charged[0]["output_tokens"] < 40
        assert charged[0]["miss_tokens"] == len(service.ran[0].prepared.prompts[0])
    assert store.value("SELECT count(*) FROM reservations") == 0
    assert desk.limiter.running(desk.keys.find("alice")) == 0


def test_a_client_that_takes_nothing_counts_as_gone(
    app_of: App, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    service.script = lambda prepared: [EngineEvent(text="x" * 200_000, token_ids=(1,)) for _ in range(100)]

    async def run() -> None:
        async with running(app_of(write_seconds=0.2)) as server:
            before = len(os.listdir("/proc/self/fd"))
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            raw = json.dumps({"model": MODEL, "prompt": "the", "stream": True}).encode()
            head = HEAD.replace(b"/chat", b"")
            writer.write(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
            await until(lambda: server.front.gate.running == 1)
            await until(lambda: server.front.gate.running == 0, 20)
            await until(lambda: len(os.listdir("/proc/self/fd")) == before + 1)  # the client's own end
            writer.transport.abort()

    asyncio.run(run())
    assert not caplog.records


def test_a_slow_head_and_a_slow_body(app_of: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "header_seconds", 0.15)

    async def run() -> list[bytes]:
        async with running(app_of(body_seconds=0.15)) as server:
            slow_head = talk(server, *(HEAD[index : index + 1] for index in range(40)), pause=0.02)
            nothing = talk(server)
            empty_lines = talk(server, *[b"\r\n"] * 20, pause=0.02)
            head = HEAD + b"content-length: %d\r\n\r\n" % len(RAW)
            slow_body = talk(server, head, *(RAW[index : index + 1] for index in range(20)), pause=0.02)
            async with httpx.AsyncClient() as client:
                quick = client.post(server.url + CHAT, json=BODY)
                *answers, response = await asyncio.gather(slow_head, nothing, empty_lines, slow_body, quick)
            assert response.status_code == 200, "nobody else notices"
            return answers

    slow_head, nothing, empty_lines, slow_body = asyncio.run(run())
    assert nothing == b""
    for answer in (slow_head, empty_lines, slow_body):
        status, error = error_of(answer)
        assert (status, error["code"]) == (408, "request_timeout")


def test_a_second_request_of_a_connection_is_held_to_the_same(app_of: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "header_seconds", 0.15)

    async def run() -> bytes:
        async with running(app_of()) as server:
            whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
            return await talk(server, whole, *[b"G", b"E", b"T", b" ", b"/"] * 3, pause=0.03)

    first, _, second = asyncio.run(run()).partition(b'{"status":"alive"}')
    assert first.startswith(b"HTTP/1.1 200")
    assert error_of(second)[0] == 408


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, 400),
        (b"GET / HTTP/1.1\r\nhost localhost\r\n\r\n", 400),
        (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 15_000, 431),
        (b"GET /" + b"x" * 70_000, 431),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example\r\n\r\n", 400),
    ],
)
def test_what_is_no_request(app_of: App, sent: bytes, status: int) -> None:
    async def run() -> bytes:
        async with running(app_of()) as server:
            return await talk(server, sent)

    found, error = error_of(asyncio.run(run()))
    assert (found, error["type"]) == (status, "invalid_request_error")


def test_too_large_a_body_is_answered_though_it_is_still_being_sent(app_of: App) -> None:
    async def run() -> list[httpx.Response]:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 100_000

        async with running(app_of(body_bytes=1_000_000)) as server, httpx.AsyncClient() as client:
            headers = {"content-type": "application/json"}
            given = (b" " * 10_000_000, pieces())
            return [await client.post(server.url + CHAT, content=each, headers=headers) for each in given]

    for response in asyncio.run(run()):
        assert response.status_code == 413
        assert response.headers["connection"] == "close"


def test_a_refused_body_is_not_waited_for(app_of: App, desk: Desk) -> None:
    async def run() -> bytes:
        async with running(app_of(desk=desk)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HEAD + b"content-length: 1000000\r\n\r\n{")
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), 1)
            writer.close()
            return answer

    assert error_of(asyncio.run(run()))[0] == 401


def test_a_refusal_is_heard_while_a_long_body_is_being_sent(app_of: App, desk: Desk) -> None:
    """And the connection goes on."""
    body = b" " * 3_000_000

    async def run() -> list[bytes]:
        async with running(app_of(desk=desk)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            heard: list[bytes] = []
            for _ in range(2):
                writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body[:9])
                heard.append(await asyncio.wait_for(reader.readuntil(b"}}"), 3))
                for begin in range(9, len(body), 100_000):
                    writer.write(body[begin : begin + 100_000])
                    await writer.drain()
            writer.close()
            return heard

    assert [error_of(answer)[0] for answer in asyncio.run(run())] == [401, 401]


def test_the_rest_of_a_refused_body_is_bounded(app_of: App, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REST_BYTES", 1_000_000)
    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    head = HEAD + b"content-length: 900000000\r\n\r\n"

    async def run() -> list[bytes]:
        async with running(app_of(desk=desk)) as server:
            large = await talk(server, head, *[b" " * 200_000] * 20, pause=0.001)
            slow = await talk(server, head, *[b" "] * 8, pause=0.1)
            return [large, slow]

    assert [error_of(answer)[0] for answer in asyncio.run(run())] == [401, 401]


def test_large_bodies_stall_nobody(app_of: App) -> None:
    """Ten megabytes of tools take seconds of work, in which the loop answers others as ever."""
    parameters = {"type": "object", "properties": {f"p{index}": {"description": "x" * 50} for index in range(250)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(500)]
    large = json.dumps({**BODY, "tools": tools}).encode()
    assert len(large) > 9_000_000

    async def run() -> tuple[httpx.Response, list[float]]:
        app = app_of(body_seconds=30.0)
        async with running(app) as server, httpx.AsyncClient(timeout=60) as client:
            headers = {"content-type": "application/json"}
            heavy = asyncio.create_task(client.post(server.url + CHAT, content=large, headers=headers))
            waits: list[float] = []
            while not heavy.done():
                begun = time.monotonic()
                assert (await client.post(server.url + CHAT, json=BODY)).status_code == 200
                waits.append(time.monotonic() - begun)
                await asyncio.sleep(0.01)
            return await heavy, waits

    response, waits = asyncio.run(run())
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert sorted(waits)[len(waits) // 2] < 0.25 and max(waits) < 1.0, waits


def test_there_are_as_many_connections_as_file_handles_allow(app_of: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 2)

    async def run() -> list[bytes]:
        async with running(app_of()) as server:
            held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await talk(server)
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.05)
            whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            return [refused, await talk(server, whole)]

    refused, good = asyncio.run(run())
    assert error_of(refused)[0] == 503
    assert good.startswith(b"HTTP/1.1 200")
