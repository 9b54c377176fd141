"""The end of a server: by real signals, with requests that run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from starlette.responses import StreamingResponse

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from abyssal.serve.app import create_app, front_of
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.lifecycle import Lifecycle, listen, url_of
from tests.support.scripted_service import ScriptedService, saying
from tests.support.serving import MODEL, served
from tests.unit.serve.http.test_answers import read_events
from tests.unit.serve.http.test_errors import check_shape
from tests.unit.serve.http.test_sockets import until

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "the"}], "stream": True}
TEXT = "the tools " * 10


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Server:
    """One that is ended by signals."""

    def __init__(
        self, service: ScriptedService, drain_seconds: float, desk: Desk | None = None, **options: Any
    ) -> None:
        self.service = service
        app = create_app(HttpSettings(MODEL), service, served, desk, **options)
        self.front = front_of(app)
        self._listener = listen("127.0.0.1", 0)
        self.open_ended = AsyncExitStack()
        self.serving = asyncio.create_task(Lifecycle(app, drain_seconds).serve(self._listener, self.open_ended))
        self.client = httpx.AsyncClient(base_url=url_of(self._listener))

    async def begun(self, **headers: str) -> asyncio.Task[httpx.Response]:
        """A stream that has begun."""
        assert (await self.client.get("/ready")).status_code == 200
        task = asyncio.create_task(self.client.post(CHAT, json=BODY, headers=headers))
        await until(lambda: self.service.running == 1)
        return task

    async def ended(self, seconds: float = 3.0) -> None:
        await asyncio.wait_for(asyncio.shield(self.serving), seconds)
        with pytest.raises(httpx.ConnectError):
            await self.client.get("/health")
        await self.client.aclose()
        await self.front.close()


def test_what_runs_is_finished_and_what_comes_is_refused(service: ScriptedService) -> None:
    service.script = saying(TEXT, pause=0.02)

    async def run() -> tuple[httpx.Response, list[httpx.Response]]:
        server = Server(service, drain_seconds=10)
        running = await server.begun()
        signalled()
        await until(lambda: server.front.gate.draining)
        paths = ("/health", "/ready")
        late = [await server.client.post(CHAT, json=BODY), *[await server.client.get(path) for path in paths]]
        response = await running
        await server.ended()
        return response, late

    response, (refused, health, ready) = asyncio.run(run())
    assert read_events(response.text)[-1] == (None, "[DONE]")
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert check_shape(refused)["code"] == "server_draining"
    assert (health.status_code, health.headers["connection"]) == (200, "close")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert service.ran[0].ended


@pytest.mark.parametrize("how", ["too long", "a second signal"])
def test_who_is_cut_off_is_told_and_charged_for_what_came(
    service: ScriptedService, desk: Desk, store: Store, how: str
) -> None:
    service.script = saying(TEXT, pause=0.05)
    key = desk.keys.create("alice")

    async def run() -> tuple[httpx.Response, float]:
        server = Server(service, 0.2 if how == "too long" else 60, desk)
        running = await server.begun(authorization=f"Bearer {key}")
        await asyncio.sleep(0.15)
        begun = time.monotonic()
        signalled()
        if how == "a second signal":
            await until(lambda: server.front.gate.draining)
            signalled()
        response = await running
        took = time.monotonic() - begun
        await server.ended()
        return response, took

    response, took = asyncio.run(run())
    *pieces, (_, last) = read_events(response.text)
    assert last["error"]["code"] == "server_draining"
    assert len(pieces) > 1
    assert took < 1
    assert service.ran[0].cancelled
    (row,) = store.rows("SELECT output_tokens FROM log")
    assert row["output_tokens"] >= len(pieces) - 1
    assert store.value("SELECT count(*) FROM reservations") == 0


def test_a_server_without_requests_ends_at_once_and_lets_watchers_go(service: ScriptedService) -> None:
    router = APIRouter()
    watching = asyncio.Event()

    @router.get("/watch")
    async def watch() -> StreamingResponse:
        async def forever() -> AsyncIterator[bytes]:
            yield b"x"
            await watching.wait()

        return StreamingResponse(forever())

    async def run() -> float:
        server = Server(service, 60, routers=[router])

        async def let_go() -> None:
            watching.set()

        server.open_ended.push_async_callback(let_go)
        async with server.client.stream("GET", "/watch") as response:
            begun = time.monotonic()
            signalled()
            assert await response.aread() == b"x"
            await server.ended()
            return time.monotonic() - begun

    assert asyncio.run(run()) < 1.5
