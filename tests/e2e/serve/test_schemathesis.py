"""schemathesis against ``/openapi.json``: whatever comes, no answer is a 5xx, every refusal has its API's shape, and
nothing that the schema forbids is accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.support.api_fuzz import Fuzz
from tests.support.live_server import LiveServer

schemathesis = pytest.importorskip("schemathesis")

MANY = 100_000


def test_requests_made_from_the_description(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def send(path: str, body: object) -> tuple[int, bytes]:
            response = http.post(path, json=body)
            return response.status_code, response.content

        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        fuzz = Fuzz(schema, send, "trained", {"max_tokens": 4})
        fuzz.run(examples=2)
    answered = {path for path, status in fuzz.statuses if status == 200}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/anthropic/v1/messages"} <= answered
    assert fuzz.requests > 80 and server.get("/ready").status_code == 200


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.slow
def test_100_000_requests(loop: asyncio.AbstractEventLoop) -> None:
    from abyssal.serve.app import create_app
    from abyssal.serve.http.settings import HttpSettings
    from tests.support.scripted_service import ScriptedService
    from tests.support.serving import MODEL, served

    service = ScriptedService()
    app = create_app(HttpSettings(MODEL), service, served)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    def send(path: str, body: object) -> tuple[int, bytes]:
        response = loop.run_until_complete(client.post(path, json=body))
        service.ran.clear()
        return response.status_code, response.content

    fuzz = Fuzz(schemathesis.openapi.from_asgi("/openapi.json", app), send, MODEL)
    while fuzz.requests < MANY:
        fuzz.run(examples=100, random=True)
        print(f"{fuzz.requests} requests")
    loop.run_until_complete(client.aclose())
