"""The desk at which the server asks: whose key is it, may it ask now, can it pay, what did it use.

    account = desk.authenticate(authorization, api_key)         # 401
    with desk.admit(account) as ticket:                         # 429
        ticket.reserve("req-1", model, prompt_tokens, most)     # 402
        ...                                                     # the engine runs
        ticket.charge(Usage("req-1", model, hit, miss, output)) # whatever became of the client

A ticket that is closed without a charge gives back what it reserved.  A request that a client dropped is charged for
what was computed until then.

Reserving, charging and asking for the balance may wait for the disk or for another process, some milliseconds as a
rule: a server with an event loop calls them in a thread.  Authenticating has a connection of its own, which waits for
nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from abyssal.serve.accounts.keys import Account, KeyRing
from abyssal.serve.accounts.limits import Limiter
from abyssal.serve.accounts.money import MOST_NANO
from abyssal.serve.accounts.prices import PriceTable
from abyssal.serve.accounts.refusal import unauthorized
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Balance, Ledger, Receipt, Usage


class Desk:
    """Accounts of one server.

    Args:
        prices: free of charge by default; usage is written down all the same.
        clock: seconds since the epoch, for expiry and prices.
        ticks: seconds that never run backwards, for limits.

    Raises:
        ValueError: prices are in another currency than balances.
    """

    def __init__(
        self,
        store: Store,
        prices: PriceTable | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prices = prices if prices is not None else PriceTable(store.currency)
        if self.prices.currency != store.currency:
            raise ValueError(f"prices are in {self.prices.currency}, balances of {store.path} in {store.currency}")
        self._reader = Store(store.path)
        self.keys = KeyRing(self._reader, clock)
        self.ledger = Ledger(store, clock)
        self.limiter = Limiter(ticks)
        self.clock = clock

    def close(self) -> None:
        """Give up reservations.  The store stays open."""
        self.ledger.close()
        self._reader.close()

    def authenticate(self, authorization: str | None, api_key: str | None = None) -> Account:
        """Who asks.

        Args:
            authorization: the header of that name, ``Bearer KEY``.
            api_key: the header ``x-api-key``, as Anthropic's clients send it; it counts where the other is missing.

        Raises:
            Refusal: 401.
        """
        if authorization is None:
            if not api_key:
                raise unauthorized("No API key was sent: send the header 'Authorization: Bearer KEY'.")
            return self.keys.authenticate(api_key.strip())
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise unauthorized("The header Authorization is not understood: send 'Authorization: Bearer KEY'.")
        return self.keys.authenticate(secret.strip())

    def admit(self, account: Account) -> Ticket:
        """Let a request in.

        Raises:
            Refusal: 429.
        """
        self.limiter.enter(account)
        return Ticket(self, account)

    def charge(self, account: Account, usage: Usage) -> Receipt:
        """Take what ``usage`` costs now.  A second time changes nothing.

        Raises:
            ValueError: the table has no such model, or the reference is of another request.
        """
        price = self.prices.price(usage.model)
        cost = price.cost(usage.hit_tokens, usage.miss_tokens, usage.output_tokens, self.clock())
        return self.ledger.charge(account, usage, cost)

    def balance(self, account: Account) -> Balance:
        return self.ledger.balance(account.account_id)


class Ticket:
    """A request that was let in, until :meth:`close`."""

    def __init__(self, desk: Desk, account: Account) -> None:
        self._desk = desk
        self.account = account
        self._reference: str | None = None
        self._counted = 0
        self._open = True

    def reserve(self, reference: str, model: str, prompt_tokens: int, most_output_tokens: int) -> None:
        """Set aside what the request may cost.

        Args:
            most_output_tokens: of all its answers together.

        Raises:
            Refusal: 402.
            ValueError: the table has no such model, or the reference was used before.
        """
        assert self._reference is None, "a ticket is for one request"
        amount = min(MOST_NANO, self._desk.prices.price(model).most(prompt_tokens, most_output_tokens))
        self._desk.ledger.reserve(self.account, reference, amount)
        self._reference = reference
        self._count(prompt_tokens)

    def charge(self, usage: Usage) -> Receipt:
        """Take what the request cost; its reservation ends."""
        assert usage.reference == self._reference, "charge what was reserved"
        receipt = self._desk.charge(self.account, usage)
        self._reference = None
        self._count(usage.total_tokens - self._counted)
        return receipt

    def close(self) -> None:
        """The request is over; twice is once."""
        if not self._open:
            return
        self._open = False
        self._desk.limiter.leave(self.account)
        if self._reference is not None:
            self._desk.ledger.release(self._reference)
            self._reference = None

    def _count(self, tokens: int) -> None:
        self._counted += tokens
        self._desk.limiter.count_tokens(self.account, tokens)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
