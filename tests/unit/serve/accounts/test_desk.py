"""A request from its header to its receipt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.keys import KeyLimits
from abyssal.serve.accounts.prices import Price, PriceTable, read_prices
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Usage

PRICES = PriceTable(models={"m": Price(hit=70_000_000, miss=270_000_000, output=1_100_000_000)})


@pytest.fixture
def desk(store: Store, clock):
    desk = Desk(store, PRICES, clock, clock)
    yield desk
    desk.close()


def status(call, *arguments) -> int:
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    return caught.value.status


def test_headers(desk: Desk) -> None:
    key = desk.keys.create("alice")
    for headers in ((f"Bearer {key}",), (f"bearer  {key} ",), (None, key), (f"Bearer {key}", "sk-other")):
        assert desk.authenticate(*headers).key_name == "alice"
    for headers in (
        (None,),
        (None, ""),
        ("",),
        (key,),
        (f"Basic {key}",),
        ("Bearer",),
        ("Bearer ",),
        (f"Bearer {key}x",),
        ("Bearer sk-other", key),
    ):
        assert status(desk.authenticate, *headers) == 401


def test_a_request(desk: Desk) -> None:
    account = desk.authenticate(None, desk.keys.create("alice", limits=KeyLimits(tokens_per_minute=200)))
    desk.ledger.top_up(account.account_id, 1_000_000)
    with desk.admit(account) as ticket:
        ticket.reserve("r", "m", prompt_tokens=100, most_output_tokens=50)
        assert desk.balance(account).reserved == 100 * 270 + 50 * 1100
        receipt = ticket.charge(Usage("r", "m", hit_tokens=64, miss_tokens=36, output_tokens=10))
    assert receipt.amount == -(64 * 70 + 36 * 270 + 10 * 1100)
    balance = desk.balance(account)
    assert (balance.total, balance.reserved) == (1_000_000 + receipt.amount, 0)
    assert desk.limiter.running(account) == 0
    with desk.admit(account) as ticket:  # 110 of 200 tokens are used
        ticket.reserve("s", "m", 90, 0)
    assert status(desk.admit, account) == 429


def test_a_ticket_that_is_not_charged_gives_everything_back(desk: Desk) -> None:
    account = desk.authenticate(None, desk.keys.create("alice", limits=KeyLimits(concurrency=1)))
    desk.ledger.top_up(account.account_id, 1_000_000)
    with pytest.raises(RuntimeError), desk.admit(account) as ticket:
        ticket.reserve("r", "m", 100, 50)
        assert status(desk.admit, account) == 429
        raise RuntimeError
    ticket.close()
    assert desk.balance(account).available == 1_000_000
    with desk.admit(account) as ticket:
        assert status(ticket.reserve, "s", "m", 100, 1_000_000) == 402
    assert desk.limiter.running(account) == 0


def test_a_model_without_a_price_is_not_served_for_nothing(desk: Desk) -> None:
    account = desk.authenticate(None, desk.keys.create("alice", postpaid=True))
    with desk.admit(account) as ticket, pytest.raises(ValueError, match="no model 'x'"):
        ticket.reserve("r", "x", 1, 1)


def test_without_prices_usage_is_logged(store: Store) -> None:
    desk = Desk(store)
    account = desk.authenticate(None, desk.keys.create("alice"))
    with desk.admit(account) as ticket:
        ticket.reserve("r", "m", 1, 1)
        ticket.charge(Usage("r", "m", 0, 1, 1))
    assert desk.balance(account).total == 0
    assert store.value("SELECT sum(output_tokens) FROM log") == 1
    desk.close()


def test_the_hour_at_the_end_decides(store: Store, clock) -> None:
    path = store.path.with_name("prices.toml")
    path.write_text(
        '[models."*"]\nhit = 1\nmiss = 1\noutput = 1\n'
        '[[models."*".off_peak]]\nfrom = "16:30"\nto = "00:30"\ndiscount = 50\n'
    )
    clock.now = datetime(2025, 1, 1, 16, 29, tzinfo=UTC).timestamp()
    desk = Desk(store, read_prices(path), clock, clock)
    account = desk.authenticate(None, desk.keys.create("alice", postpaid=True))
    with desk.admit(account) as ticket:
        ticket.reserve("r", "m", 2, 0)
        clock.now += 60
        assert ticket.charge(Usage("r", "m", 0, 2, 0)).amount == -1000
    desk.close()


def test_who_asks_does_not_wait_for_who_pays(store: Store, desk: Desk) -> None:
    key = desk.keys.create("alice")
    with ThreadPoolExecutor(1) as pool, store.transaction():
        assert pool.submit(desk.authenticate, None, key).result(timeout=5).key_name == "alice"


def test_one_currency(store: Store) -> None:
    with pytest.raises(ValueError, match="CNY"):
        Desk(store, PriceTable("CNY"))
