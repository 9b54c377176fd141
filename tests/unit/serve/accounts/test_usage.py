"""The ledger: what is reserved, charged and logged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from abyssal.serve.accounts.keys import Account, KeyRing
from abyssal.serve.accounts.money import MOST_NANO
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Ledger, Usage


def open_account(store: Store, balance: int = 0, name: str = "alice", postpaid: bool = False) -> Account:
    keys = KeyRing(store)
    account = keys.authenticate(keys.create(name, postpaid=postpaid))
    if balance:
        Ledger(store).top_up(account.account_id, balance)
    return account


def used(reference: str, output: int = 3) -> Usage:
    return Usage(reference, "m", hit_tokens=64, miss_tokens=10, output_tokens=output, reasoning_tokens=1)


def refused(ledger: Ledger, account: Account, reference: str, amount: int) -> str:
    with pytest.raises(Refusal) as caught:
        ledger.reserve(account, reference, amount)
    assert (caught.value.status, caught.value.code) == (402, "insufficient_balance")
    return caught.value.message


def test_a_charge_is_a_row_and_a_balance(store: Store, clock) -> None:
    account = open_account(store, 1000)
    ledger = Ledger(store, clock)
    ledger.reserve(account, "r1", 300)
    assert ledger.balance(account.account_id).available == 700
    receipt = ledger.charge(account, used("r1"), 250)
    assert (receipt.amount, receipt.balance, receipt.repeated) == (-250, 750, False)
    balance = ledger.balance(account.account_id)
    assert (balance.total, balance.reserved, balance.available, balance.currency) == (750, 0, 750, "USD")
    row = store.row("SELECT * FROM log WHERE reference = 'r1'")
    assert row is not None
    assert {name: row[name] for name in row.keys() if name not in ("id", "key")} == {  # noqa: SIM118
        "account": account.account_id,
        "kind": "usage",
        "reference": "r1",
        "amount": -250,
        "model": "m",
        "hit_tokens": 64,
        "miss_tokens": 10,
        "output_tokens": 3,
        "reasoning_tokens": 1,
        "at": clock.now,
    }
    assert row["key"] == account.key_id
    assert ledger.disagreements() == []


def test_a_charge_said_twice_happens_once(store: Store) -> None:
    account, other = open_account(store, 1000), open_account(store, 1000, "bob")
    ledger = Ledger(store)
    ledger.charge(account, used("r1"), 250)
    again = ledger.charge(account, used("r1"), 125)  # as the hour may have become cheaper
    assert (again.amount, again.balance, again.repeated) == (-250, 750, True)
    for wrong in ((account, used("r1", output=4)), (other, used("r1"))):
        with pytest.raises(ValueError, match="in the log already"):
            ledger.charge(*wrong, 250)
    with pytest.raises(ValueError, match="in the log already"):
        ledger.top_up(account.account_id, 5, "r1")
    with pytest.raises(ValueError, match="used before"):
        ledger.reserve(account, "r1", 1)
    assert ledger.balance(account.account_id).total == 750 and ledger.balance(other.account_id).total == 1000
    assert store.value("SELECT count(*) FROM log WHERE kind = 'usage'") == 1


def test_top_ups(store: Store) -> None:
    account = open_account(store)
    ledger = Ledger(store)
    assert ledger.top_up(account.account_id, 500, "payment 1").balance == 500
    assert ledger.top_up(account.account_id, 500, "payment 1").repeated
    assert ledger.top_up(account.account_id, 500).balance == 1000
    assert ledger.top_up(account.account_id, -200).balance == 800
    with pytest.raises(ValueError, match="in the log already"):
        ledger.top_up(account.account_id, 501, "payment 1")
    with pytest.raises(ValueError, match="at most"):
        ledger.top_up(account.account_id, MOST_NANO)
    with pytest.raises(ValueError, match="no account 99"):
        ledger.top_up(99, 1)
    assert ledger.disagreements() == []


def test_what_is_set_aside_is_not_spent_again(store: Store) -> None:
    account = open_account(store, 100)
    ledger = Ledger(store)
    ledger.reserve(account, "a", 60)
    assert "0.00000006 USD" in refused(ledger, account, "b", 60)
    ledger.reserve(account, "b", 40)
    refused(ledger, account, "c", 1)
    ledger.reserve(account, "free", 0)
    ledger.release("b")
    ledger.release("never reserved")
    ledger.reserve(account, "c", 40)
    with pytest.raises(ValueError, match="used before"):
        ledger.reserve(account, "c", 0)
    ledger.close()
    assert ledger.balance(account.account_id).available == 100


def test_a_request_that_overshoots_is_charged_in_full_and_the_next_refused(store: Store) -> None:
    account = open_account(store, 100)
    ledger = Ledger(store)
    ledger.reserve(account, "a", 100)
    assert ledger.charge(account, used("a"), 130).balance == -30
    assert "is spent (-0.00000003 USD)" in refused(ledger, account, "b", 1)
    ledger.top_up(account.account_id, 31)
    ledger.reserve(account, "b", 1)


def test_who_pays_later_may_owe(store: Store) -> None:
    account = open_account(store, postpaid=True)
    ledger = Ledger(store)
    ledger.reserve(account, "a", 10**12)
    ledger.charge(account, used("a"), 10**12)
    for number in range(4):  # more than 64 bits can count
        ledger.reserve(account, f"b{number}", MOST_NANO)
    balance = ledger.balance(account.account_id)
    assert (balance.total, balance.reserved, balance.postpaid) == (-(10**12), 0, True)
    with pytest.raises(ValueError, match="used before"):
        ledger.reserve(account, "b0", 1)


def test_parallel_requests_of_several_servers_do_not_overspend(
    tmp_path: Path, open_store: Callable[[Path], Store]
) -> None:
    """Four connections, sixteen threads, money for ten requests."""
    stores = [open_store(tmp_path / "a") for _ in range(4)]
    account = open_account(stores[0], 1005)
    ledgers = [Ledger(store) for store in stores]
    ready = threading.Barrier(16)

    def ask(number: int) -> bool:
        ready.wait()
        ledger = ledgers[number % 4]
        try:
            ledger.reserve(account, f"r{number}", 100)
        except Refusal:
            return False
        ledger.charge(account, used(f"r{number}"), 100)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(16))) == 10
    assert ledgers[0].balance(account.account_id).total == 5
    assert ledgers[0].disagreements() == []
    for ledger, store in zip(ledgers, stores, strict=True):
        ledger.close()
        store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_reservations_of_the_living_stay(tmp_path: Path) -> None:
    with Store(tmp_path / "a") as one, Store(tmp_path / "a") as two:
        account = open_account(one, 100)
        living, asking = Ledger(one), Ledger(two)
        living.reserve(account, "a", 100)
        refused(asking, account, "b", 1)
        assert asking.balance(account.account_id).reserved == 100
        living.close()
        asking.reserve(account, "b", 1)
        asking.close()


def test_an_edited_balance_is_noticed(store: Store) -> None:
    open_account(store, 100)
    open_account(store, 100, "bob")
    with store.transaction():
        store.write("UPDATE accounts SET balance = 101 WHERE name = 'bob'")
    assert Ledger(store).disagreements() == ["bob"]


@pytest.mark.parametrize(
    "counts", [{"hit_tokens": -1}, {"output_tokens": 2**31}, {"reasoning_tokens": 4}, {"reference": ""}]
)
def test_impossible_usage(counts: dict) -> None:
    with pytest.raises(ValueError):
        Usage(**{"reference": "r", "model": "m", "hit_tokens": 1, "miss_tokens": 1, "output_tokens": 3, **counts})


references = st.sampled_from([f"r{i}" for i in range(6)])
accounts = st.integers(0, 1)
amounts = st.integers(0, 120)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), accounts, references, amounts),
        st.tuples(st.just("charge"), accounts, references, amounts),
        st.tuples(st.just("release"), accounts, references, amounts),
        st.tuples(st.just("topup"), accounts, references, amounts),
    ),
    max_size=25,
)


@trials(deadline=None, max_examples=30)
@given(steps=actions)
def test_the_log_adds_up_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, open_store: Callable[[Path], Store], steps: list
) -> None:
    """Against a model: a balance is the sum of what was said first under each reference."""
    with open_store(tmp_path_factory.mktemp("trial") / "a") as store:
        ledger = Ledger(store)
        both = [open_account(store, 200, name) for name in ("alice", "bob")]
        expected = [200, 200]
        known: dict[str, tuple] = {}
        reserved: dict[str, tuple[int, int]] = {}
        for action, who, reference, amount in steps:
            held = sum(value for owner, value in reserved.values() if owner == who)
            if action == "reserve":
                try:
                    ledger.reserve(both[who], reference, amount)
                except ValueError:
                    assert reference in known or reference in reserved
                except Refusal:
                    assert expected[who] - held < amount
                else:
                    assert expected[who] - held >= amount
                    reserved[reference] = (who, amount)
            elif action == "release":
                ledger.release(reference)
                reserved.pop(reference, None)
            else:
                what = (action, who) if action == "charge" else (action, who, amount)
                try:
                    if action == "charge":
                        receipt = ledger.charge(both[who], used(reference), amount)
                    else:
                        receipt = ledger.top_up(both[who].account_id, amount, reference)
                except ValueError:
                    assert known[reference] != what
                    continue
                assert receipt.repeated == (reference in known)
                if not receipt.repeated:
                    known[reference] = what
                    expected[who] += amount if action == "topup" else -amount
                if action == "charge":
                    reserved.pop(reference, None)
            assert [ledger.balance(account.account_id).total for account in both] == expected
        assert ledger.disagreements() == []
        ledger.close()
