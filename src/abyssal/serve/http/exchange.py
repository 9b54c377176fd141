"""One request for an answer, from its head to the last byte: who asks, read, made ready, paid, run, written.

The engine's events come as they come and wait in a mailbox, whatever the client takes of them; so what was computed is
known when a client leaves, and a slow one holds up nothing.  A client that leaves ends the request at once: the work is
cancelled, and what it had computed is charged.  The charge comes before the last byte, so whoever holds a whole answer
has paid for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from abyssal.serve.accounts.keys import Account
from abyssal.serve.http.bill import Bill
from abyssal.serve.http.body import ClientGone, parse
from abyssal.serve.http.dialect import Dialect
from abyssal.serve.http.front import Front, own_fault
from abyssal.serve.http.gate import draining
from abyssal.serve.http.mailbox import Mailbox
from abyssal.serve.http.output import Output
from abyssal.serve.http.pulse import Pulse
from abyssal.serve.http.work import Work
from abyssal.serve.observer import Arrival, Outcome, Watch
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import Origin

Make = Callable[[Mapping[str, Any]], Work]
"""A body's work; runs in a thread.  Raises ApiError."""

_LEFT = 499
"""nginx's status of a request whose client left before there was an answer."""


class Exchange(Response):
    """A response that does it all when it is called.

    Args:
        endpoint: the route, for metrics.
    """

    def __init__(self, front: Front, dialect: Dialect, endpoint: str, make: Make) -> None:
        super().__init__()
        self._front = front
        self._dialect = dialect
        self._endpoint = endpoint
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        output = Output(scope, send, self._dialect, self._front.settings.write_seconds)
        run = _Run(self._front, self._make, scope["state"]["request_id"], Headers(scope=scope), receive, output)
        await run.to_its_end(self._endpoint)


class _Run:
    """What an exchange knows while it goes on."""

    def __init__(
        self, front: Front, make: Make, request_id: str, headers: Headers, receive: Receive, output: Output
    ) -> None:
        self._front = front
        self._make = make
        self._request_id = request_id
        self._headers = headers
        self._receive = receive
        self._output = output
        self._work: Work | None = None
        self._bill: Bill | None = None
        self._gone = False
        self._error = ""
        self._cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def to_its_end(self, endpoint: str) -> None:
        """Whatever happens."""
        account, refused = self._account()
        watch = self._front.observer.begin(self._arrival(endpoint, account))
        try:
            await self._answer(account, refused, watch)
        except ClientGone:
            self._gone = True
            await self._output.abort()
        except asyncio.CancelledError:
            self._gone = True
            raise
        finally:
            watch.end(self._outcome())

    def _account(self) -> tuple[Account | None, ApiError | None]:
        try:
            return self._front.authenticate(self._headers), None
        except ApiError as error:
            return None, error

    async def _answer(self, account: Account | None, refused: ApiError | None, watch: Watch) -> None:
        try:
            if refused is not None:
                raise refused
            with self._front.gate.inside(self.cut_off):
                self._bill = Bill(self._front, account, self._request_id)
                try:
                    self._work = await self._read()
                    await self._until_gone(self._serve(self._work, account, watch))
                finally:
                    await self._bill.settle()
        except ApiError as error:
            await self._fail(error)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            await self._fail(self._own_fault(error))

    async def _fail(self, error: ApiError) -> None:
        self._error = error.code or error.type
        await self._output.error(error)

    async def _read(self) -> Work:
        """The body, made ready."""
        make = self._make
        async with self._front.bodies.read(self._headers, self._receive) as raw:
            return await self._until_gone(self._front.threads.prepare(len(raw), lambda: make(parse(raw))))

    def cut_off(self) -> None:
        """The server ends now."""
        if not self._cut.done():
            self._cut.set_result(None)

    async def _until_gone(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do it, unless the client leaves first or takes nothing any more, or the server ends.

        Raises:
            ClientGone: it has.
            ApiError: 503, it does.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((task, gone, self._cut, self._stuck), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._cut.done():
                raise draining()
            raise ClientGone
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _serve(self, work: Work, account: Account | None, watch: Watch) -> None:
        assert self._bill is not None
        await self._bill.reserve(work)
        mailbox = Mailbox()
        pump = asyncio.ensure_future(self._pump(work, self._origin(work, account), watch, mailbox))
        try:
            await self._write(work, mailbox)
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    def _origin(self, work: Work, account: Account | None) -> Origin:
        """With accounts, service is shared between them: a caller's own users would be as many shares as it invents."""
        if account is None:
            return Origin(self._request_id, user=work.user)
        return Origin(self._request_id, account.namespace, str(account.account_id))

    async def _pump(self, work: Work, origin: Origin, watch: Watch, mailbox: Mailbox) -> None:
        """Run the work into the mailbox."""
        try:
            async with aclosing(work.chunks(origin, watch)) as chunks:
                async for each in chunks:
                    mailbox.put(each)
        except ApiError as error:
            mailbox.end(error)
        except Exception as error:
            mailbox.end(self._own_fault(error))
        else:
            mailbox.end()

    async def _write(self, work: Work, mailbox: Mailbox) -> None:
        assert self._bill is not None
        waiting = Pulse(self._front.settings.keep_alive_seconds, mailbox.nudge)
        taking = Pulse(self._front.settings.write_seconds, self._check_taken)
        try:
            while (bodies := await mailbox.take()) or not mailbox.ended:
                waiting.touch()
                taking.touch()
                await (self._output.events(bodies) if bodies else self._output.keep_alive(work.stream))
        finally:
            waiting.stop()
            taking.stop()
        if mailbox.error is not None:
            raise mailbox.error
        body = None if work.stream else work.body()
        await self._bill.settle()
        await (self._output.end_stream() if body is None else self._output.body(body))

    def _check_taken(self) -> None:
        """A while after the client was sent something."""
        if self._output.sending and not self._stuck.done():
            self._stuck.set_result(None)

    def _own_fault(self, error: Exception) -> ApiError:
        self._front.report(self._request_id, error)
        return own_fault(self._request_id)

    def _arrival(self, endpoint: str, account: Account | None) -> Arrival:
        return Arrival(
            request_id=self._request_id,
            endpoint=endpoint,
            at=time.monotonic(),
            key_name="" if account is None else account.key_name,
            traceparent=self._headers.get("traceparent"),
            tracestate=self._headers.get("tracestate"),
        )

    def _outcome(self) -> Outcome:
        bill, work = self._bill, self._work
        return Outcome(
            status=self._output.status or _LEFT,
            disconnected=self._gone,
            error=self._error,
            model="" if work is None else work.model,
            stream=work is not None and work.stream,
            usage=None if bill is None else bill.usage,
            cost=0 if bill is None else bill.cost,
            saved=0 if bill is None else bill.saved,
        )
