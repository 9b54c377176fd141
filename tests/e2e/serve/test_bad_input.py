"""What no client should send, over real sockets, while another client streams: each gets the right refusal, in OpenAI's
shape, and the other's text is what it is without them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.support.live_server import LiveServer
from tests.support.streams import Heard, http_client, prompt, stream

CHAT = "/v1/chat/completions"
WRITING = {"model": "trained", "prompt": prompt(7), "max_tokens": 700, "temperature": 0, "ignore_eos": True}
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "trained", "messages": HELLO, "max_tokens": 2, **fields}).encode()


def schema(megabytes: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"enum": ["x" * 1000]} for n in range(megabytes * 1000)}}


BAD: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, "invalid_json"),
    "half of JSON": (b'{"model": "trained", "messages": [', 400, "invalid_json"),
    "no object": (b"[1, 2]", 400, "invalid_json"),
    "not UTF-8": (b'{"model": "\xff\xfe"}', 400, "invalid_json"),
    "no number": (b'{"model": "trained", "temperature": NaN}', 400, "invalid_json"),
    "a name twice": (b'{"model": "trained", "model": "other"}', 400, "invalid_json"),
    "nested deeply": (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, "invalid_json"),
    "another model": (chat(model="gpt-4o"), 404, "model_not_found"),
    "a type": (chat(temperature="hot"), 422, "invalid_value"),
    "an unknown parameter": (chat(tempature=1), 422, "unknown_parameter"),
    "a picture": (chat(messages=[{"role": "user", "content": PICTURE}]), 422, None),
    "tools without calls": (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 422, None),
    "half of a surrogate pair": (
        b'{"model": "trained", "messages": [{"role": "user", "content": "\\ud800"}]}',
        422,
        None,
    ),
    "too long a prompt": (chat(messages=[{"role": "user", "content": "word " * 5000}]), 400, "context_length_exceeded"),
    "too large": (chat(messages=[{"role": "user", "content": "x" * (17 << 20)}]), 413, "request_too_large"),
}


@contextmanager
def somebody_writes(server: LiveServer) -> Iterator[None]:
    """A client that streams meanwhile; it must get what it gets alone."""

    async def write() -> Heard:
        async with http_client(server, 1) as http:
            return await stream(http, WRITING)

    alone = asyncio.run(write())
    with asyncio.Runner() as runner:
        beside = runner.get_loop().create_task(write())
        runner.run(asyncio.sleep(0.2))
        yield
        heard = runner.run(_result(beside))
    assert heard.complete and heard.text == alone.text, "the other client noticed"


async def _result(task: asyncio.Task[Heard]) -> Heard:
    return await task


def exchange(server: LiveServer, head: bytes, body: bytes = b"", wait: float = 20) -> tuple[int, dict[str, Any]]:
    """Bytes as they are; the answer's status and JSON."""
    with socket.create_connection(("127.0.0.1", server.port), wait) as connection:
        connection.settimeout(wait)
        connection.sendall(head)
        with suppress(BrokenPipeError, ConnectionResetError):  # it answers before it has read a body that it refuses
            connection.sendall(body)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
    top, _, rest = received.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(rest) if rest else {}


def head(path: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "connection: close", f"content-length: {length}", *more]
    return ("\r\n".join([*lines, "", ""])).encode()


def assert_refused(answer: tuple[int, dict[str, Any]], status: int, code: str | None) -> None:
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code


def test_bad_bodies_are_refused_and_nobody_else_notices(server: LiveServer) -> None:
    with somebody_writes(server):
        for name, (body, status, code) in BAD.items():
            start = time.monotonic()
            answer = exchange(server, head(CHAT, len(body), "content-type: application/json"), body)
            assert_refused(answer, status, code)
            assert time.monotonic() - start < 10, name
    assert server.get("/ready").status_code == 200


def test_a_schema_of_10_megabytes_is_refused_by_name(family_server: LiveServer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema(10)}}
    body = chat(model="family", tools=[tool], tool_choice="required")
    start = time.monotonic()
    answer = exchange(family_server, head(CHAT, len(body), "content-type: application/json"), body, 60)
    assert answer[0] in (400, 422) and answer[1]["error"]["message"], answer
    assert time.monotonic() - start < 30
    assert (
        exchange(
            family_server, head(CHAT, len(chat(model="family")), "content-type: application/json"), chat(model="family")
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    "headers",
    [
        ("CONTENT-TYPE: APPLICATION/JSON",),
        ("Content-type:application/json; Charset=UTF-8",),
        ("cOnTeNt-TyPe: application/json",),
    ],
)
def test_headers_in_odd_cases_are_read(server: LiveServer, headers: tuple[str, ...]) -> None:
    body = chat()
    assert exchange(server, head(CHAT, len(body), *headers), body)[0] == 200


def test_slow_clients_hold_up_nobody(server: LiveServer) -> None:
    """Fifty of them, each of which sends a byte now and then, and never comes to an end."""
    slow: list[socket.socket] = []
    try:
        for number in range(50):
            slow.append(socket.create_connection(("127.0.0.1", server.port), 10))
            slow[-1].sendall(head(CHAT, 1000, "content-type: application/json") if number % 2 else b"POST /v1/ch")
        with somebody_writes(server):
            for each in slow:
                each.sendall(b"{" if slow.index(each) % 2 else b"a")
            body = chat()
            assert exchange(server, head(CHAT, len(body), "content-type: application/json"), body)[0] == 200
    finally:
        for each in slow:
            each.close()
