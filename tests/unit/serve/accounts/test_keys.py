"""API keys: made, found, refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from abyssal.serve.accounts.keys import KeyLimits, KeyRing
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.accounts.store import Store


def refused(keys: KeyRing, secret: str) -> str:
    with pytest.raises(Refusal) as caught:
        keys.authenticate(secret)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    return caught.value.message


def test_a_key_opens_its_account_alone(store: Store) -> None:
    keys = KeyRing(store)
    limits = KeyLimits(requests_per_minute=60, tokens_per_minute=1000, concurrency=2)
    alice = keys.create("alice", limits=limits)
    bob = keys.create("bob", namespace="shared")
    assert alice != bob and min(len(alice), len(bob)) > 40
    account = keys.authenticate(alice)
    assert (account.key_name, account.account_name, account.limits) == ("alice", "alice", limits)
    assert alice.endswith(account.hint)
    assert keys.authenticate(bob).namespace == "shared"
    assert keys.authenticate(bob).limits == KeyLimits()
    assert keys.find("alice") == account and [key.key_name for key in keys.all()] == ["alice", "bob"]


def test_no_namespace_is_shared_unless_asked_for(store: Store) -> None:
    keys = KeyRing(store)
    spaces = {keys.authenticate(keys.create(f"key {i}")).namespace for i in range(20)}
    assert len(spaces) == 20 and all(spaces)


def test_unknown_keys(store: Store) -> None:
    keys = KeyRing(store)
    secret = keys.create("alice")
    other = "A" if secret[-1] != "A" else "B"
    for wrong in ("", "sk-", secret[:-1], secret[:-1] + other, secret + " ", secret.upper(), "\ud800", "ü" * 10_000):
        assert refused(keys, wrong) == "This API key is not known."


def test_the_whole_digest_counts(store: Store) -> None:
    """Not only the part by which a key is looked up."""
    keys = KeyRing(store)
    secret = keys.create("alice")
    with store.transaction():
        store.write("UPDATE keys SET digest = CAST(selector || zeroblob(24) AS BLOB)")
    refused(keys, secret)


def test_disabled_and_expired(store: Store, clock) -> None:
    keys = KeyRing(store, clock)
    secret = keys.create("alice", expires=clock.now + 10)
    assert keys.set_disabled("alice", True).disabled
    assert refused(keys, secret) == "This API key is disabled."
    assert not keys.set_disabled("alice", False).disabled
    clock.now += 9.5
    keys.authenticate(secret)
    clock.now += 0.5
    assert refused(keys, secret) == "This API key has expired."


def test_an_account_is_shared_on_purpose_only(store: Store) -> None:
    keys = KeyRing(store)
    keys.create("laptop", account="team", postpaid=True)
    keys.create("phone", account="team")
    assert keys.find("laptop").account_id == keys.find("phone").account_id
    assert keys.find("phone").postpaid
    with pytest.raises(ValueError, match="there is an account named 'team'"):
        keys.create("team")
    keys.create("solo")
    with pytest.raises(ValueError, match="prepaid"):
        keys.create("other", account="solo", postpaid=True)
    assert [key.key_name for key in keys.all()] == ["laptop", "phone", "solo"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": " a"},
        {"name": "a" * 129},
        {"name": "taken"},
        {"name": "new", "account": ""},
        {"name": "new", "namespace": ""},
        {"name": "new", "expires": 5.0},
        {"name": "new", "expires": float("nan")},
        {"name": "new", "expires": float("inf")},
    ],
)
def test_bad_input(store: Store, arguments: dict) -> None:
    keys = KeyRing(store)
    keys.create("taken")
    with pytest.raises(ValueError):
        keys.create(**arguments)
    assert len(keys.all()) == 1 == store.value("SELECT count(*) FROM accounts")
    with pytest.raises(ValueError, match="no key named 'new'"):
        keys.set_disabled("new", True)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(KeyLimits)])
def test_a_limit_is_at_least_one(name: str) -> None:
    for value in (0, -1, 2**31):
        with pytest.raises(ValueError, match=name):
            KeyLimits(**{name: value})


def test_the_secret_is_nowhere_in_the_files(store: Store, tmp_path: Path) -> None:
    secret = KeyRing(store).create("alice")
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"alice" in content
    assert not any(secret[i : i + 8].encode() in content for i in range(len(secret) - 7))
