"""What a request owes: set aside before it runs, and taken when it is done, whatever becomes of the client.

Reserving and charging wait for the disk, so they run in threads; and since a thread cannot be cancelled, neither can
they: a request that ends meanwhile waits for its reservation before it is settled, or the money would stay set aside.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from functools import partial

from abyssal.serve.accounts.desk import Ticket
from abyssal.serve.accounts.keys import Account
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.accounts.usage import Usage as Charged
from abyssal.serve.events import Usage
from abyssal.serve.http.front import Front, log, of_refusal
from abyssal.serve.http.work import Work
from abyssal.serve.protocol.errors import ApiError, unknown_model


class Bill:
    """Of one request.

    Args:
        account: None on an open server, where nothing costs anything.

    Raises:
        ApiError: 429.
    """

    def __init__(self, front: Front, account: Account | None, request_id: str) -> None:
        self._front = front
        self._request_id = request_id
        self._ticket: Ticket | None = None
        self._reserving: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._work: Work | None = None
        self.usage: Usage | None = None
        """What was charged."""
        self.cost = 0
        self.saved = 0
        if front.desk is not None and account is not None:
            try:
                self._ticket = front.desk.admit(account)
            except Refusal as refusal:
                raise of_refusal(refusal) from None

    async def reserve(self, work: Work) -> None:
        """Set aside what it may cost.

        Raises:
            ApiError: 402; 404 where its model has no price; 503 the accounts cannot be written.
        """
        self._work = work
        if self._ticket is None or work.most is None:
            return
        if self._front.price(work.model) is None:
            raise unknown_model(work.model, [self._front.settings.model])
        reserve = partial(
            self._ticket.reserve, self._request_id, work.model, work.most.prompt_tokens, work.most.most_output_tokens
        )
        self._reserving = self._front.spawn(self._front.threads.desk(reserve))
        try:
            await asyncio.shield(self._reserving)
        except Refusal as refusal:
            raise of_refusal(refusal) from None
        except sqlite3.Error as error:
            log.error("%s: the accounts cannot be written: %s", self._request_id, error)
            raise ApiError(503, "The accounts cannot be written now; try again later", retry_after=5) from None

    async def settle(self) -> None:
        """Charge what was used, and let the next one in; twice is once."""
        if self._settling is None:
            self._settling = self._front.spawn(self._settle())
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        if self._reserving is not None:
            await asyncio.wait([self._reserving])
        work = self._work
        if work is not None and work.usage is not None:
            self._count(work.model, work.usage)
        if self._ticket is None:
            return
        if self._reserving is None:  # nothing is in the file
            self._ticket.close()
            return
        try:
            await self._front.threads.desk(partial(self._charge, self._ticket))
        except Exception as error:  # the answer is out; the log has what the file has not
            log.error("%s was not charged for %s (%s)", self._request_id, self.usage, type(error).__name__)

    def _count(self, model: str, usage: Usage) -> None:
        self.usage = usage
        if (price := self._front.price(model)) is not None:
            now = time.time() if self._front.desk is None else self._front.desk.clock()
            self.cost = price.cost(usage.cached_tokens, usage.missed_tokens, usage.completion_tokens, now)
            self.saved = price.saved(usage.cached_tokens, now)

    def _charge(self, ticket: Ticket) -> None:
        """In a thread."""
        assert self._reserving is not None and self._work is not None
        try:
            reserved = self._reserving.exception() is None
            if self.usage is not None and reserved:
                self.cost = -ticket.charge(_charged(self._request_id, self._work.model, self.usage)).amount
        finally:
            ticket.close()


def _charged(request_id: str, model: str, usage: Usage) -> Charged:
    return Charged(
        request_id, model, usage.cached_tokens, usage.missed_tokens, usage.completion_tokens, usage.reasoning_tokens
    )
