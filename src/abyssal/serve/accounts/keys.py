"""API keys: made once, shown once, kept as a digest.

A key is 32 random bytes, so one round of SHA-256 protects it as well as a slow hash would: there is nothing to guess
that a slow hash could make slower.  It is looked up by the first bytes of its digest and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from abyssal.serve.accounts.refusal import unauthorized
from abyssal.serve.accounts.store import Store

_PREFIX = "sk-"
_SECRET_BYTES = 32
_SELECTOR_BYTES = 8
_HINT_LETTERS = 4
_NAME_LETTERS = 128
_END_OF_TIME = 253_370_764_800.0  # 1 January 9999
_COLUMNS = (
    "account",
    "name",
    "selector",
    "digest",
    "hint",
    "namespace",
    "expires",
    "requests_per_minute",
    "tokens_per_minute",
    "concurrency",
    "created",
)


@dataclass(frozen=True)
class KeyLimits:
    """What a key may ask for; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompt and answer together."""
    concurrency: int | None = None
    """Requests at a time."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value}: it must be at least 1, or left out for no limit")


@dataclass(frozen=True)
class Account:
    """A key, and the account that pays for it."""

    key_id: int
    key_name: str
    account_id: int
    account_name: str
    namespace: str
    """Of the context cache: only requests with the same one share pages."""
    limits: KeyLimits
    postpaid: bool
    """May owe money: nothing is refused for its balance."""
    disabled: bool
    expires: float | None
    """Seconds since the epoch from which the key is void."""
    created: float
    hint: str
    """The key's last letters, by which its owner knows it."""
    balance: int
    """In billionths, when this was read."""


class KeyRing:
    """The keys in a store.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def create(
        self,
        name: str,
        account: str | None = None,
        postpaid: bool = False,
        namespace: str | None = None,
        expires: float | None = None,
        limits: KeyLimits | None = None,
    ) -> str:
        """A new key, in the only copy there will be.

        Args:
            account: who pays; it is made if it is not there.  Its own, named like the key, by default.
            postpaid: of a new account: it may owe money.
            namespace: of the context cache; one that no other key has by default.

        Raises:
            ValueError: the name is taken or empty, or ``postpaid`` is not what the account is.
        """
        limits = limits or KeyLimits()
        for what, text in (("name", name), ("account", account), ("namespace", namespace)):
            _check_name(what, text)
        if expires is not None and not self._clock() < expires < _END_OF_TIME:  # nor is it a NaN
            raise ValueError("a key expires in the future, and before the year 9999")
        secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        digest = _digest(secret)
        with self._store.transaction():
            if self._store.row("SELECT 1 FROM keys WHERE name = ?", name):
                raise ValueError(f"there is a key named {name!r}: choose another name")
            account_id = self._account(account or name, postpaid, shared=account is not None)
            self._store.insert(
                "keys",
                _COLUMNS,
                account_id,
                name,
                digest[:_SELECTOR_BYTES],
                digest,
                secret[-_HINT_LETTERS:],
                namespace or f"key-{secrets.token_hex(8)}",
                expires,
                limits.requests_per_minute,
                limits.tokens_per_minute,
                limits.concurrency,
                self._clock(),
            )
        return secret

    def _account(self, name: str, postpaid: bool, shared: bool) -> int:
        found = self._store.row("SELECT id, postpaid FROM accounts WHERE name = ?", name)
        if found is None:
            columns = ("name", "postpaid", "created")
            return self._store.insert("accounts", columns, name, int(postpaid), self._clock())
        if not shared:  # nobody pays for another's key because of a name
            raise ValueError(f"there is an account named {name!r}: name it as the account to share it")
        if postpaid and not found["postpaid"]:
            raise ValueError(f"the account {name!r} is prepaid: it stays so")
        return int(found["id"])

    def authenticate(self, secret: str) -> Account:
        """Whose key it is.

        Raises:
            Refusal: 401: unknown, disabled or expired.
        """
        digest = _digest(secret)
        candidates = self._store.rows(f"{_SELECT} WHERE selector = ?", digest[:_SELECTOR_BYTES])
        matches = [row for row in candidates if hmac.compare_digest(row["digest"], digest)]
        if not matches:
            raise unauthorized("This API key is not known.")
        account = _account_of(matches[0])
        if account.disabled:
            raise unauthorized("This API key is disabled.")
        if account.expires is not None and account.expires <= self._clock():
            raise unauthorized("This API key has expired.")
        return account

    def find(self, name: str) -> Account:
        """The key named so.

        Raises:
            ValueError: there is none.
        """
        row = self._store.row(f"{_SELECT} WHERE keys.name = ?", name)
        if row is None:
            raise ValueError(f"there is no key named {name!r}: `abyssal keys list` names them all")
        return _account_of(row)

    def all(self) -> list[Account]:
        """Oldest first."""
        return [_account_of(row) for row in self._store.rows(f"{_SELECT} ORDER BY keys.id")]

    def set_disabled(self, name: str, disabled: bool) -> Account:
        """Takes effect with the next request; those that run are finished, and charged.

        Raises:
            ValueError: there is no such key.
        """
        with self._store.transaction():
            self._store.write("UPDATE keys SET disabled = ? WHERE name = ?", int(disabled), name)
            return self.find(name)


_SELECT = (
    "SELECT keys.*, accounts.name AS account_name, accounts.postpaid, accounts.balance "
    "FROM keys JOIN accounts ON accounts.id = keys.account"
)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _check_name(what: str, text: str | None) -> None:
    if text is not None and not (0 < len(text) <= _NAME_LETTERS and text.isprintable() and text == text.strip()):
        raise ValueError(f"{what} is {text!r}: write 1 to {_NAME_LETTERS} printable letters")


def _account_of(row: sqlite3.Row) -> Account:
    return Account(
        key_id=row["id"],
        key_name=row["name"],
        account_id=row["account"],
        account_name=row["account_name"],
        namespace=row["namespace"],
        limits=KeyLimits(row["requests_per_minute"], row["tokens_per_minute"], row["concurrency"]),
        postpaid=bool(row["postpaid"]),
        disabled=bool(row["disabled"]),
        expires=row["expires"],
        created=row["created"],
        hint=row["hint"],
        balance=row["balance"],
    )
