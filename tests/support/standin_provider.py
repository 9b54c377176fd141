"""A small server with OpenAI's API on loopback, which stands in for another provider and answers as a test tells it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

USAGE: Mapping[str, Any] = {
    "prompt_tokens": 11,
    "completion_tokens": 4,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
WORDS = ("Two", " and", " two", " make four")


@dataclass
class StandIn:
    """What it was asked, and how it is to answer."""

    url: str = ""
    """Of its API, ``/v1`` included."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies as they came, with ``path`` and ``authorization``."""
    status: int = 200
    error: Mapping[str, Any] = field(default_factory=lambda: {"message": "so it is", "type": "t", "code": None})
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of an error."""
    message: Mapping[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": "".join(WORDS)})
    pause: float = 0.0
    """Seconds before an answer, and before each chunk of a stream."""
    break_after: int | None = None
    """Chunks of a stream, after which the connection is cut."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client left before its answer was complete."""

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        heard = {"path": request.url.path, "authorization": request.headers.get("authorization")}
        self.requests.append({**body, **heard})
        if self.status != 200:
            return JSONResponse({"error": dict(self.error)}, self.status, dict(self.headers))
        chat = request.url.path.endswith("/chat/completions")
        if body.get("stream"):
            return StreamingResponse(self._stream(body, chat), media_type="text/event-stream")
        if await self._left(request):
            self.gone.set()
        return JSONResponse(self._whole(body, chat))

    async def _left(self, request: Request) -> bool:
        end = time.monotonic() + self.pause
        while time.monotonic() < end:
            if await request.is_disconnected():
                return True
            await asyncio.sleep(0.02)
        return False

    def _whole(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        said = {"message": dict(self.message)} if chat else {"text": "".join(WORDS)}
        kind = "chat.completion" if chat else "text_completion"
        choices = [{"index": 0, **said, "finish_reason": "stop", "logprobs": None}]
        return {"id": "x-1", "object": kind, "created": 1, "model": body["model"], "choices": choices, "usage": USAGE}

    async def _stream(self, body: Mapping[str, Any], chat: bool) -> AsyncIterator[bytes]:
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": "x-1", "object": kind, "created": 1, "model": body["model"]}
        complete = False
        try:
            for number, choice in enumerate(_choices(chat)):
                await asyncio.sleep(self.pause)
                if number == self.break_after:
                    raise ConnectionResetError("cut by the test")
                yield _event({**head, "choices": [{"index": 0, "logprobs": None, **choice}]})
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({**head, "choices": [], "usage": USAGE})
            yield b"data: [DONE]\n\n"
            complete = True
        finally:
            if not complete:
                self.gone.set()


def _choices(chat: bool) -> list[dict[str, Any]]:
    if not chat:
        return [{"text": word, "finish_reason": None} for word in WORDS] + [{"text": "", "finish_reason": "stop"}]
    said = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
    return [{"delta": delta, "finish_reason": None} for delta in said] + [{"delta": {}, "finish_reason": "stop"}]


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """A stand-in that runs in a thread meanwhile."""
    stand_in = StandIn()
    paths = ("/v1/chat/completions", "/v1/completions")
    app = Starlette(routes=[Route(path, stand_in.answer, methods=["POST"]) for path in paths])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + 10
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        assert server.started, "the stand-in does not start"
        try:
            yield stand_in
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
