"""The operator's endpoints, over HTTP without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from abyssal.serve.observe import feed as feeds
from abyssal.serve.observe.observability import Observability
from abyssal.serve.observe.routes import MOST_STEPS
from abyssal.serve.protocol.errors import ApiError
from tests.support.watched import StandIn


async def with_key(request: Request) -> None:
    if request.headers.get("authorization") != "Bearer right":
        raise ApiError(401, "No API key was sent.")


async def trace(steps: int, seconds: float) -> bytes:
    return json.dumps({"traceEvents": [], "steps": steps, "seconds": seconds}).encode()


def app_of(seen: Observability, **options: object) -> FastAPI:
    app = FastAPI()
    app.include_router(seen.router(**options))  # pyright: ignore[reportArgumentType]

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.openai(), error.status)

    return app


@asynccontextmanager
async def client(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made:
        yield made


def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(app) as asking:
            return await asking.get(path, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"])
def test_metrics_keep_their_names_whoever_asks(accept: str) -> None:
    answer = get(app_of(Observability("tiny", StandIn())), "/metrics", accept=accept)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in answer.text


def test_the_board_is_told_as_json() -> None:
    told = get(app_of(Observability("tiny", StandIn(restarts=2))), "/board").json()
    assert (told["model"], told["restarts"], told["saved"]["priced"]) == ("tiny", 2, False)


@pytest.mark.parametrize("path", ["/metrics", "/board", "/board/events"])
def test_where_there_are_keys_one_is_wanted(path: str) -> None:
    seen = Observability("tiny", StandIn())
    seen.feed.close()  # a stream then ends with its snapshot
    app = app_of(seen, operator=with_key, scraper=with_key)
    assert get(app, path).status_code == 401
    assert get(app, path, authorization="Bearer right").status_code == 200


def test_traces_are_recorded_where_the_server_does_so() -> None:
    seen = Observability("tiny", StandIn())

    async def ask(app: FastAPI, query: str) -> httpx.Response:
        async with client(app) as asking:
            return await asking.post(f"/debug/trace{query}")

    app = app_of(seen, record=trace)
    answer = asyncio.run(ask(app, "?steps=7&seconds=2"))
    assert answer.json() == {"traceEvents": [], "steps": 7, "seconds": 2.0}
    assert "abyssal-trace.json" in answer.headers["content-disposition"]
    assert asyncio.run(ask(app, f"?steps={MOST_STEPS + 1}")).status_code == 422
    assert asyncio.run(ask(app_of(seen), "")).status_code == 404


def parsed(piece: bytes) -> tuple[str, dict[str, object]]:
    name, data, *rest = piece.decode().split("\n")
    assert rest == ["", ""]
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_the_stream_begins_with_all_and_goes_on_with_samples() -> None:
    async def listen() -> None:
        service = StandIn()
        seen = Observability("tiny", service)
        seen.feed._interval = 0.01
        stream = seen.feed.events()
        assert parsed(await anext(stream))[0] == "snapshot"
        async with seen.running():
            service.change(running=5)
            for _ in range(3):
                name, sample = parsed(await asyncio.wait_for(anext(stream), 5))
            assert (name, sample["now"]["running"]) == ("sample", 5)  # pyright: ignore
            assert seen.feed.listeners == 1
        # The server ends, and nobody who looks holds it up.
        assert [piece async for piece in stream] == []
        assert seen.feed.listeners == 0

    asyncio.run(listen())


def test_who_leaves_is_counted_no_longer() -> None:
    async def listen() -> None:
        seen = Observability("tiny", StandIn())
        stream = seen.feed.events()
        await anext(stream)
        await stream.aclose()
        assert seen.feed.listeners == 0

    asyncio.run(listen())


def test_too_many_pages_are_refused() -> None:
    seen = Observability("tiny", StandIn())
    seen.feed.listeners = feeds.MOST_LISTENERS
    answer = get(app_of(seen), "/board/events")
    assert answer.status_code == 429
    assert "close some" in answer.json()["error"]["message"]
