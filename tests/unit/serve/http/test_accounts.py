"""Keys, limits and money around every answer."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx
import pytest

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.keys import KeyLimits
from abyssal.serve.accounts.prices import Price, PriceTable
from abyssal.serve.accounts.store import Store
from abyssal.serve.events import Usage
from abyssal.serve.observer import Arrival, Outcome
from abyssal.serve.protocol.errors import ApiError
from tests.support.scripted_service import ScriptedService, saying
from tests.support.serving import MODEL, events, served
from tests.unit.serve.http.test_answers import body
from tests.unit.serve.http.test_errors import check_shape

Client = Callable[..., httpx.AsyncClient]
CHAT = "/v1/chat/completions"
MILLI = 1_000_000
"""Of a currency's unit, in billionths."""


@pytest.fixture
def paid(store: Store) -> Any:
    """A desk with prices: a thousandth of a dollar a token, half of it from the cache."""
    price = Price(hit=500 * 10**9, miss=1000 * 10**9, output=1000 * 10**9)
    desk = Desk(store, PriceTable("USD", {MODEL: price}))
    yield desk
    desk.close()


class Recorded:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.outcomes: list[Outcome] = []
        self.events = 0

    def begin(self, arrival: Arrival) -> Recorded:
        self.arrivals.append(arrival)
        return self

    def prepared(self, *_: Any) -> None: ...

    def event(self, *_: Any) -> None:
        self.events += 1

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def rows(store: Store) -> list[dict[str, Any]]:
    return [dict(row) for row in store.rows("SELECT * FROM log WHERE kind = 'usage' ORDER BY id")]


def left_over(store: Store) -> int:
    return store.value("SELECT count(*) FROM reservations")


def post(client: httpx.AsyncClient, times: int = 1, **fields: Any) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with client:
            return [await client.post(CHAT, json=body(CHAT, **fields)) for _ in range(times)]

    return asyncio.run(run())


def test_whoever_has_no_key_is_refused_everywhere(client_of: Client, desk: Desk) -> None:
    desk.keys.create("alice")

    async def run() -> list[httpx.Response]:
        async with client_of(desk=desk) as client:
            asked = [client.get(path) for path in ("/v1/models", "/models/x", "/user/balance")]
            posts = [client.post(path, json={}) for path in (CHAT, "/tokenize", "/detokenize", "/v1/responses")]
            wrong = client.post(CHAT, json={}, headers={"Authorization": "Bearer sk-wrong"})
            return [await each for each in (*asked, *posts, wrong)]

    for response in asyncio.run(run()):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert check_shape(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("name", ["Authorization", "AUTHORIZATION", "x-api-key", "X-Api-Key"])
def test_a_key_in_any_header_and_case(client_of: Client, desk: Desk, name: str) -> None:
    key = desk.keys.create("alice")
    client = client_of(desk=desk)
    client.headers[name] = f"bearer {key}" if name.lower() == "authorization" else key
    assert post(client)[0].status_code == 200


def test_an_answer_is_charged_and_remembered(
    client_of: Client, paid: Desk, store: Store, service: ScriptedService
) -> None:
    key = paid.keys.create("alice")
    account = paid.keys.find("alice")
    paid.ledger.top_up(account.account_id, 10_000 * MILLI)
    service.script = saying("the tools", cached_tokens=4)
    seen = Recorded()
    (response,) = post(client_of(key, desk=paid, observer=seen), user="bob")
    usage = response.json()["usage"]
    (row,) = rows(store)
    assert row["reference"] == response.headers["x-request-id"] == seen.arrivals[0].request_id
    assert (row["hit_tokens"], row["miss_tokens"]) == (4, usage["prompt_tokens"] - 4)
    assert row["output_tokens"] == usage["completion_tokens"] > 1
    cost = MILLI * (usage["prompt_tokens"] - 2 + usage["completion_tokens"])
    assert row["amount"] == -cost
    assert paid.balance(account).total == 10_000 * MILLI - cost
    (outcome,) = seen.outcomes
    assert (outcome.status, outcome.cost, outcome.saved, outcome.model) == (200, cost, 2 * MILLI, MODEL)
    assert outcome.usage == Usage(usage["prompt_tokens"], usage["completion_tokens"], 4)
    assert (seen.arrivals[0].key_name, seen.arrivals[0].endpoint) == ("alice", CHAT)
    origin = service.ran[0].origin
    assert (origin.namespace, origin.user) == (account.namespace, str(account.account_id))
    assert left_over(store) == 0


def test_a_spent_balance(client_of: Client, paid: Desk, store: Store, service: ScriptedService) -> None:
    key = paid.keys.create("alice")
    account = paid.keys.find("alice")
    first, second = post(client_of(key, desk=paid)), post(client_of(key, desk=paid), max_tokens=5)
    paid.ledger.top_up(account.account_id, 100 * MILLI)
    dear, cheap = post(client_of(key, desk=paid)), post(client_of(key, desk=paid), max_tokens=5)
    assert [each[0].status_code for each in (first, second, dear, cheap)] == [402, 402, 402, 200]
    assert check_shape(first[0])["code"] == "insufficient_balance"
    assert len(service.ran) == 1, "what cannot be paid is not run"
    assert left_over(store) == 0


def test_limits_of_a_key(client_of: Client, desk: Desk, service: ScriptedService) -> None:
    key = desk.keys.create("alice", limits=KeyLimits(requests_per_minute=2))
    *good, refused = post(client_of(key, desk=desk), 3)
    assert [response.status_code for response in good] == [200, 200]
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert check_shape(refused)["code"] == "rate_limit_exceeded"
    one = desk.keys.create("bob", limits=KeyLimits(concurrency=1))
    service.script = saying("the tools", first=0.05)

    async def run() -> list[int]:
        async with client_of(one, desk=desk) as client:
            both = await asyncio.gather(*(client.post(CHAT, json=body(CHAT)) for _ in range(2)))
            after = await client.post(CHAT, json=body(CHAT))
            return [*sorted(response.status_code for response in both), after.status_code]

    assert asyncio.run(run()) == [200, 429, 200]


def test_what_fails_amid_is_charged_for_what_was_delivered(
    client_of: Client, desk: Desk, store: Store, service: ScriptedService
) -> None:
    key = desk.keys.create("alice")
    service.script = lambda prepared: [*events(served(), "the tools")[:1], ApiError(503, "The engine ended")]
    (response,) = post(client_of(key, desk=desk), stream=True)
    assert '"error"' in response.text
    (row,) = rows(store)
    assert row["output_tokens"] == 1 and row["miss_tokens"] == len(service.ran[0].prepared.prompts[0])
    service.script = lambda prepared: [ApiError(503, "The engine ended")]
    post(client_of(key, desk=desk))
    assert len(rows(store)) == 1, "nothing came, nothing is charged"
    assert left_over(store) == 0


def test_of_many_prompts_those_count_that_were_begun(
    client_of: Client, desk: Desk, store: Store, service: ScriptedService
) -> None:
    key = desk.keys.create("alice")
    service.script = lambda prepared: [*events(served(), "the tools", prompt=1), ApiError(503, "The engine ended")]

    async def run() -> None:
        async with client_of(key, desk=desk) as client:
            await client.post("/v1/completions", json={"model": MODEL, "prompt": ["the", "the tools and"]})

    asyncio.run(run())
    (row,) = rows(store)
    assert row["miss_tokens"] == len(service.ran[0].prepared.prompts[1])


def test_a_model_without_a_price_is_not_sold(client_of: Client, store: Store) -> None:
    desk = Desk(store, PriceTable("USD", {"another": Price(1, 1, 1)}))
    (response,) = post(client_of(desk.keys.create("alice"), desk=desk))
    assert response.status_code == 404
    assert check_shape(response)["code"] == "model_not_found"
    desk.close()


def test_nobody_goes_before_others_who_share_the_server(client_of: Client, desk: Desk) -> None:
    key = desk.keys.create("alice")
    (before,) = post(client_of(key, desk=desk, free_priority=False), priority=1)
    (behind,) = post(client_of(key, desk=desk, free_priority=False), priority=-1)
    assert (before.status_code, behind.status_code) == (422, 200)
    assert check_shape(before)["param"] == "priority"


def test_the_balance_in_deepseek_s_shape(client_of: Client, paid: Desk) -> None:
    def balance(key: str | None, **options: Any) -> Any:
        async def run() -> Any:
            async with client_of(key, **options) as client:
                return (await client.get("/user/balance")).json()

        return asyncio.run(run())

    assert balance(None) == {"is_available": True, "balance_infos": []}
    key = paid.keys.create("alice")
    assert balance(key, desk=paid)["is_available"] is False
    paid.ledger.top_up(paid.keys.find("alice").account_id, 110 * 10**9)
    info = {"currency": "USD", "total_balance": "110.00", "granted_balance": "0.00", "topped_up_balance": "110.00"}
    found = balance(key, desk=paid)
    assert found == {"is_available": True, "balance_infos": [info]}
    assert Decimal(found["balance_infos"][0]["total_balance"]) == 110


def test_a_charge_that_fails_is_in_the_log_with_all_that_it_was(
    client_of: Client, desk: Desk, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("no space left")

    key = desk.keys.create("alice")
    monkeypatch.setattr(desk.ledger, "charge", full)
    (response,) = post(client_of(key, desk=desk))
    assert response.status_code == 200
    assert f"{response.headers['x-request-id']} was not charged" in caplog.text
    assert "completion_tokens=" in caplog.text
    assert (left_over(store), desk.limiter.running(desk.keys.find("alice"))) == (0, 0)


def test_accounts_that_cannot_be_written(
    client_of: Client, desk: Desk, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    key = desk.keys.create("alice")
    monkeypatch.setattr(desk.ledger, "reserve", full)
    (response,) = post(client_of(key, desk=desk))
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    check_shape(response)
    assert not service.ran
    assert desk.limiter.running(desk.keys.find("alice")) == 0
