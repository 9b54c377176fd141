"""Models of other providers behind the same keys, limits and usage log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import httpx
import pytest

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from abyssal.serve.events import Usage
from abyssal.serve.protocol.errors import ApiError, bad_parameter
from abyssal.serve.routing import Kind, Piece, Routed, Routes
from abyssal.serve.service import Origin, State
from tests.support.scripted_service import ScriptedService
from tests.unit.serve.http.test_answers import read_events

Client = Callable[..., httpx.AsyncClient]
CHAT = "/v1/chat/completions"


class Elsewhere:
    """A provider that says three words."""

    def __init__(self) -> None:
        self.fails = False
        self.closed = False
        self.ran: list[tuple[Routed, Origin]] = []

    def prepare(self, kind: Kind, body: Mapping[str, Any]) -> Routed:
        if body.get("messages") is None:
            raise bad_parameter("messages", "missing; give it")
        return Routed(body["model"], kind, body, bool(body.get("stream")), 7, 3)

    async def run(self, routed: Routed, origin: Origin) -> AsyncGenerator[Piece, None]:
        self.ran.append((routed, origin))
        for number in range(1, 4):
            if self.fails and number == 3:
                raise ApiError(502, "It failed")
            yield Piece({"choices": [{"word": number}]} if routed.stream else None, Usage(7, number, 2))
        if not routed.stream:
            yield Piece({"whole": True}, Usage(7, 3, 2))

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def routes(elsewhere: Elsewhere) -> Routes:
    return Routes({"far/": elsewhere})


def post(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client:
            return await client.post(path, json=fields)

    return asyncio.run(run())


def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return post(client, CHAT, **{"model": "far/one", "messages": [], **fields})


def usage_rows(store: Store) -> list[tuple[Any, ...]]:
    rows = store.rows("SELECT model, hit_tokens, miss_tokens, output_tokens FROM log ORDER BY id")
    return [tuple(row) for row in rows]


def test_it_answers_by_the_name_s_beginning_and_is_charged(
    client_of: Client, desk: Desk, store: Store, routes: Routes, elsewhere: Elsewhere, service: ScriptedService
) -> None:
    key = desk.keys.create("alice")
    service.state = State.FAILED
    whole = ask(client_of(key, desk=desk, routes=routes))
    assert (whole.status_code, whole.json()) == (200, {"whole": True})
    stream = ask(client_of(key, desk=desk, routes=routes), stream=True)
    words = [data["choices"][0]["word"] for _, data in read_events(stream.text)[:-1]]
    assert words == [1, 2, 3] and stream.text.endswith("data: [DONE]\n\n")
    assert usage_rows(store) == [("far/one", 2, 5, 3)] * 2
    assert elsewhere.ran[0][1].namespace == desk.keys.find("alice").namespace
    assert not service.ran


def test_what_it_refuses_and_where_it_fails(
    client_of: Client, desk: Desk, store: Store, routes: Routes, elsewhere: Elsewhere
) -> None:
    key = desk.keys.create("alice")
    refused = ask(client_of(key, desk=desk, routes=routes), messages=None)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "messages")
    assert not elsewhere.ran
    elsewhere.fails = True
    failed = ask(client_of(key, desk=desk, routes=routes))
    assert (failed.status_code, failed.json()["error"]["message"]) == (502, "It failed")
    assert usage_rows(store)[-1] == ("far/one", 2, 5, 2)


@pytest.mark.parametrize("path", ["/v1/responses", "/beta/chat/completions", "/anthropic/v1/messages"])
def test_other_apis_do_not_go_there(client_of: Client, routes: Routes, elsewhere: Elsewhere, path: str) -> None:
    fields = {"input": "a"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "a"}]}
    more = {"max_tokens": 5} if "anthropic" in path else {}
    response = post(client_of(routes=routes), path, model="far/one", **fields, **more)
    assert response.status_code == 404, response.text
    assert not elsewhere.ran


def test_another_name_is_looked_for_here(client_of: Client, routes: Routes, elsewhere: Elsewhere) -> None:
    for model in ("near/one", "far", 7, None):
        assert ask(client_of(routes=routes), model=model).status_code in (404, 422)
    assert not elsewhere.ran
