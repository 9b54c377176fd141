"""The operator's endpoints, over HTTP without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from abyssal.serve.app import create_app
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.observe import feed as feeds
from abyssal.serve.observe.observability import Observability
from abyssal.serve.observe.routes import MOST_STEPS, anybody
from tests.support.scripted_service import ScriptedService
from tests.support.serving import MODEL, served
from tests.support.watched import StandIn


async def trace(steps: int, seconds: float) -> bytes:
    return json.dumps({"traceEvents": [], "steps": steps, "seconds": seconds}).encode()


def app_of(seen: Observability, desk: Desk | None = None, **options: object) -> FastAPI:
    router = seen.router(**options)  # pyright: ignore[reportArgumentType]
    service = ScriptedService()
    return create_app(HttpSettings(MODEL), service, served, desk, observer=seen.observer, routers=[router])


@asynccontextmanager
async def client(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made:
        yield made


def post(app: FastAPI, path: str, body: object = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(app) as asking:
            return await asking.post(path, json=body)

    return asyncio.run(ask())


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
def test_where_there_are_keys_one_is_wanted(path: str, tmp_path: Path) -> None:
    seen = Observability("tiny", StandIn())
    seen.feed.close()  # a stream then ends with its snapshot
    with Store(tmp_path / "accounts.sqlite") as store:
        desk = Desk(store)
        secret = desk.keys.create("ada")
        app = app_of(seen, desk)
        refused = get(app, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert get(app, path, authorization=f"Bearer {secret}").status_code == 200
        assert get(app_of(seen, desk, operator=anybody, scraper=anybody), path).status_code == 200
        desk.close()


@pytest.mark.parametrize("query", ["steps=0", "steps=2.5", f"steps={MOST_STEPS + 1}", "seconds=nan", "seconds=x"])
def test_a_traces_size_is_checked(query: str) -> None:
    app = app_of(Observability("tiny", StandIn()), record=trace)
    answer = post(app, f"/debug/trace?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, query.partition("=")[0])


def test_requests_are_counted_whatever_becomes_of_them() -> None:
    seen = Observability(MODEL, StandIn())
    app = app_of(seen)
    chat = "/v1/chat/completions"
    good = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    assert post(app, chat, good).status_code == 200
    assert post(app, chat, {**good, "stream": True}).status_code == 200
    assert post(app, chat, {**good, "temperature": 9}).status_code == 422
    text = get(app, "/metrics").text
    assert f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 2.0' in text
    assert f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 2.0' in text
    assert f'abyssal:http_responses_total{{path="{chat}",status="200"}} 2.0' in text
    assert f'abyssal:http_responses_total{{path="{chat}",status="422"}} 1.0' in text


def test_traces_are_recorded_where_the_server_does_so() -> None:
    seen = Observability("tiny", StandIn())
    answer = post(app_of(seen, record=trace), "/debug/trace?steps=7&seconds=2")
    assert answer.json() == {"traceEvents": [], "steps": 7, "seconds": 2.0}
    assert "abyssal-trace.json" in answer.headers["content-disposition"]
    assert post(app_of(seen), "/debug/trace").status_code == 404


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


def test_a_server_that_drains_lets_the_board_go() -> None:
    async def listen() -> None:
        seen, draining = Observability("tiny", StandIn()), False
        seen.feed._interval = 0.01
        async with seen.running():
            stream = seen.feed.events(lambda: draining)
            await anext(stream)
            await asyncio.wait_for(anext(stream), 5)
            draining = True
            left = [piece async for piece in stream]
            assert len(left) <= 1

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
