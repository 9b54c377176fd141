"""The ledger: money set aside for a request before it runs, and charged for what it used when it is done.

A prepaid account admits a request if its balance, less what is set aside for requests that run, covers the reservation;
so any number of parallel requests, in any number of processes, spends the money only once.  A request that ends up
dearer than its reservation is charged in full, as it was served in full: the balance may then lie below zero, by no
more than the requests that ran exceeded their reservations, and nothing is admitted until it is topped up.  Whoever
reserves the most that a request can cost (:meth:`~abyssal.serve.accounts.prices.Price.most`) is never exceeded.

A charge is known by its reference, the request's id: said twice, it happens once.  References are the server's own
invention; one that a client chose could be chosen twice, for an answer that costs nothing.

What a killed server had not charged yet is not charged, and its reservations lapse (:mod:`.holder`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from abyssal.serve.accounts.holder import Holder, is_alive
from abyssal.serve.accounts.keys import Account
from abyssal.serve.accounts.money import MOST_NANO, format_money
from abyssal.serve.accounts.refusal import unpaid
from abyssal.serve.accounts.store import Store

_MOST_TOKENS = 2**31
_COLUMNS = [
    "account",
    "key",
    "kind",
    "reference",
    "amount",
    "model",
    "hit_tokens",
    "miss_tokens",
    "output_tokens",
    "reasoning_tokens",
    "at",
]


@dataclass(frozen=True)
class Usage:
    """What a request used."""

    reference: str
    """The request's id, unique among all requests and top-ups."""
    model: str
    hit_tokens: int
    """Of the prompt, found in the context cache."""
    miss_tokens: int
    """Of the prompt, computed."""
    output_tokens: int
    """Of all answers, reasoning included."""
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("hit_tokens", "miss_tokens", "output_tokens", "reasoning_tokens"):
            if not 0 <= getattr(self, name) < _MOST_TOKENS:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to {_MOST_TOKENS - 1}")
        if self.reasoning_tokens > self.output_tokens:
            raise ValueError("reasoning_tokens are part of output_tokens, and cannot be more")
        if not self.reference:
            raise ValueError("a usage needs the id of its request")

    @property
    def total_tokens(self) -> int:
        return self.hit_tokens + self.miss_tokens + self.output_tokens


@dataclass(frozen=True)
class Receipt:
    """A change of a balance, as the log has it."""

    reference: str | None
    amount: int
    """Billionths: below zero for a charge."""
    balance: int
    """Now."""
    repeated: bool
    """It had happened before; nothing was changed this time."""


@dataclass(frozen=True)
class Balance:
    """Of an account, in billionths."""

    total: int
    reserved: int
    currency: str
    postpaid: bool

    @property
    def available(self) -> int:
        return self.total - self.reserved


class Ledger:
    """Balances in a store, and their log.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._holder: Holder | None = None

    def close(self) -> None:
        """Give up what is still reserved."""
        with self._store.transaction(durable=False):
            if self._holder is None:
                return
            self._store.write("DELETE FROM reservations WHERE holder = ?", self._holder.name)
            self._holder.close()
            self._holder = None

    def top_up(self, account_id: int, amount: int, reference: str | None = None) -> Receipt:
        """Add ``amount`` billionths; below zero takes money back.

        Args:
            reference: of the payment; one that was seen before changes nothing.

        Raises:
            ValueError: the balance would be too large, there is no such account, or the reference is of another change.
        """
        with self._store.transaction():
            before = self._balance(account_id)
            if abs(before + amount) > MOST_NANO:
                raise ValueError(f"a balance is at most {format_money(MOST_NANO)} either way")
            return self._enter(account_id, None, "topup", reference, amount)

    def charge(self, account: Account, usage: Usage, cost: int) -> Receipt:
        """Write down what a request used, take ``cost`` billionths, and end its reservation: all or nothing.

        Raises:
            ValueError: the reference is of another change.  Nothing is charged.
        """
        assert 0 <= cost <= MOST_NANO, cost
        with self._store.transaction():
            self._store.write("DELETE FROM reservations WHERE reference = ?", usage.reference)
            tokens = (usage.hit_tokens, usage.miss_tokens, usage.output_tokens, usage.reasoning_tokens)
            return self._enter(
                account.account_id, account.key_id, "usage", usage.reference, -cost, usage.model, *tokens
            )

    def _enter(
        self,
        account_id: int,
        key_id: int | None,
        kind: str,
        reference: str | None,
        amount: int,
        model: str | None = None,
        *tokens: int,
    ) -> Receipt:
        """The row and the balance, inside a transaction."""
        tokens = tokens or (0, 0, 0, 0)
        known = None if reference is None else self._store.row("SELECT * FROM log WHERE reference = ?", reference)
        if known is not None:
            # Not the amount: the same usage may cost less when the hour has changed.
            same = (known["account"], known["key"], known["kind"], known["model"], *_tokens(known))
            if same != (account_id, key_id, kind, model, *tokens) or (kind == "topup" and known["amount"] != amount):
                raise ValueError(f"the reference {reference!r} is in the log already, for something else")
            return Receipt(reference, known["amount"], self._balance(account_id), repeated=True)
        self._store.insert("log", _COLUMNS, account_id, key_id, kind, reference, amount, model, *tokens, self._clock())
        self._store.write("UPDATE accounts SET balance = balance + ? WHERE id = ?", amount, account_id)
        return Receipt(reference, amount, self._balance(account_id), repeated=False)

    def reserve(self, account: Account, reference: str, amount: int) -> None:
        """Set ``amount`` billionths aside for the request ``reference``, until it is charged or released.

        Nothing is set aside where the account may owe; the reference is taken all the same.

        Raises:
            Refusal: 402: there is not as much left.
            ValueError: the reference is not new.
        """
        assert 0 <= amount <= MOST_NANO, amount
        with self._store.transaction(durable=False):
            if self._holder is None:
                self._holder = Holder(self._store.path)
            self._check_new(reference)
            if not account.postpaid:
                self._check_covered(account.account_id, amount)
            values = (reference, account.account_id, 0 if account.postpaid else amount, self._holder.name)
            self._store.write("INSERT INTO reservations VALUES (?, ?, ?, ?)", *values)

    def _check_new(self, reference: str) -> None:
        for table in ("log", "reservations"):
            if self._store.row(f"SELECT 1 FROM {table} WHERE reference = ?", reference):
                raise ValueError(f"the reference {reference!r} was used before: give every request its own")

    def _check_covered(self, account_id: int, amount: int) -> None:
        balance = self._balance(account_id)
        # Nothing is free for who has nothing: an answer that overshoots would be.
        if balance <= 0 and amount > 0:
            raise unpaid(f"The balance is spent ({format_money(balance)} {self._store.currency}).")
        if balance - self._reserved(account_id) < amount:
            self._lapse(account_id)
        available = balance - self._reserved(account_id)
        if available < amount:
            raise unpaid(
                f"This request may cost {format_money(amount)} {self._store.currency}, and {format_money(available)} "
                f"are left beside what running requests may cost: ask for fewer tokens, wait for them, or top up."
            )

    def release(self, reference: str) -> None:
        """End a reservation without a charge; nothing if there is none."""
        with self._store.transaction(durable=False):
            self._store.write("DELETE FROM reservations WHERE reference = ?", reference)

    def _lapse(self, account_id: int) -> None:
        """Forget reservations of processes that are gone."""
        holders = self._store.rows("SELECT DISTINCT holder FROM reservations WHERE account = ?", account_id)
        own = self._holder.name if self._holder is not None else None
        for (name,) in holders:
            if name != own and not is_alive(self._store.path, name):
                self._store.write("DELETE FROM reservations WHERE holder = ?", name)

    def balance(self, account_id: int) -> Balance:
        """Of the account now; what a killed server had reserved does not count."""
        with self._store.transaction(durable=False):
            self._lapse(account_id)
            postpaid = self._store.value("SELECT postpaid FROM accounts WHERE id = ?", account_id)
            total, reserved = self._balance(account_id), self._reserved(account_id)
        return Balance(total, reserved, self._store.currency, bool(postpaid))

    def disagreements(self) -> list[str]:
        """Names of accounts whose balance is not the sum of their log: none, unless somebody edited the file."""
        query = (
            "SELECT name FROM accounts WHERE balance != "
            "(SELECT coalesce(sum(amount), 0) FROM log WHERE log.account = accounts.id)"
        )
        return [name for (name,) in self._store.rows(query)]

    def _balance(self, account_id: int) -> int:
        balance = self._store.value("SELECT balance FROM accounts WHERE id = ?", account_id)
        if balance is None:
            raise ValueError(f"there is no account {account_id}")
        return int(balance)

    def _reserved(self, account_id: int) -> int:
        return int(self._store.value("SELECT coalesce(sum(amount), 0) FROM reservations WHERE account = ?", account_id))


def _tokens(row: sqlite3.Row) -> tuple[int, int, int, int]:
    return row["hit_tokens"], row["miss_tokens"], row["output_tokens"], row["reasoning_tokens"]
