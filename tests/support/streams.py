"""Clients that stream from a live server, many at once, as an event loop runs them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.live_server import LiveServer


@dataclass
class Heard:
    """What a client got."""

    text: str = ""
    chunks: int = 0
    status: int | None = None
    complete: bool = False
    """It saw ``[DONE]``."""
    error: str = ""
    """Of the server, or of the connection."""
    ended_at: float = field(default=0.0)
    """By the monotonic clock."""


def http_client(server: LiveServer, clients: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def stream(
    http: httpx.AsyncClient, body: Mapping[str, Any], leave_after: int | None = None, key: str = "any"
) -> Heard:
    """Ask ``/v1/completions`` for a stream, and read it.

    Args:
        leave_after: chunks, after which the client goes away.
    """
    heard = Heard()
    try:
        headers = {"authorization": f"Bearer {key}"}
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}, headers=headers) as response:
            heard.status = response.status_code
            if response.status_code != 200:
                heard.error = (await response.aread()).decode()
                return heard
            async for event in _events(response):
                if "error" in event:
                    heard.error = json.dumps(event)
                    continue
                heard.chunks += 1
                heard.text += event["choices"][0]["text"] if event["choices"] else ""
                if heard.chunks == leave_after:
                    return heard
            heard.complete = not heard.error
    except httpx.HTTPError as error:
        heard.error = repr(error)
    finally:
        heard.ended_at = time.monotonic()
    return heard


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Until ``[DONE]``, or an error.

    Raises:
        httpx.HTTPError: it ended before.
    """
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line[6:])
            yield event
            if "error" in event:
                return
    raise httpx.RemoteProtocolError("the stream ended without [DONE]")


def prompt(number: int, words: int = 12) -> str:
    """Unlike every other's from its beginning."""
    draw = random.Random(number)
    return f"# {number}\n" + " ".join(draw.choice(("import", "def", "self", "return", "class")) for _ in range(words))
