"""What all requests of a server share, and what each needs of it: who asks, what runs here, and who pays."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.keys import Account
from abyssal.serve.accounts.prices import Price, PriceTable
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.http.body import Bodies
from abyssal.serve.http.gate import Gate
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.http.threads import Threads
from abyssal.serve.observer import Observer
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.routing import Routes
from abyssal.serve.service import Service, State

log = logging.getLogger("abyssal.serve")

_RETRY_STARTING = 2


class Front:
    """Of one server.

    Args:
        served: the model that runs here; called once the service is ready.
        desk: of the accounts; None: anybody may ask.
        prices: on an open server, where nobody pays: what answers would cost, for metrics.
    """

    def __init__(
        self,
        settings: HttpSettings,
        service: Service,
        served: Callable[[], ServedModel],
        desk: Desk | None,
        routes: Routes,
        observer: Observer,
        prices: PriceTable | None = None,
    ) -> None:
        self.settings = settings
        self.service = service
        self.desk = desk
        self.prices = prices if desk is None else desk.prices
        self.routes = routes
        self.observer = observer
        self.gate = Gate(settings.most_requests)
        self.bodies = Bodies(settings)
        self.threads = Threads()
        self.created = int(time.time())
        """When the server began: what its models' ``created`` says."""
        self._served = served
        self._tasks: set[asyncio.Task[Any]] = set()

    def served(self) -> ServedModel:
        """The model that runs here.

        Raises:
            ApiError: 503, it does not run now.
        """
        check_state(self.service.state)
        return self._served()

    def state(self) -> str:
        """What ``/ready`` says."""
        return "draining" if self.gate.draining else self.service.state.value

    def authenticate(self, headers: Mapping[str, str]) -> Account | None:
        """Who asks; None where anybody may.

        Raises:
            ApiError: 401.
        """
        if self.desk is None:
            return None
        try:
            return self.desk.authenticate(headers.get("authorization"), headers.get("x-api-key"))
        except Refusal as refusal:
            raise of_refusal(refusal) from None

    def price(self, model: str) -> Price | None:
        """Of a model; None where the table has none, or there is no table."""
        if self.prices is None:
            return None
        try:
            return self.prices.price(model)
        except ValueError:
            return None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that goes on when who began it is cancelled; :meth:`close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settled(self, seconds: float) -> None:
        """Wait until all that was used is charged, so long at most."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=seconds)

    async def close(self) -> None:
        """Nobody asks any more."""
        await self.settled(10.0)
        await self.routes.close()
        self.threads.close()

    def report(self, request_id: str, error: BaseException) -> None:
        """A mistake of the server's own, in the log.  What the error says may quote the request."""
        lines = "".join(traceback.format_tb(error.__traceback__))
        said = f": {error}" if self.settings.log_prompts else ""
        log.error("%s failed\n%s%s%s", request_id, lines, type(error).__name__, said)


def check_state(state: State) -> None:
    """Whether the model runs.

    Raises:
        ApiError: 503.
    """
    if state is State.FAILED:
        raise ApiError(503, "The model cannot run; the server's log says why", code="model_failed", retry_after=60)
    if state is not State.READY:
        message = f"The model is {state.value}; try again later"
        raise ApiError(503, message, code="model_not_ready", retry_after=_RETRY_STARTING)


def of_refusal(refusal: Refusal) -> ApiError:
    """As the API says it."""
    return ApiError(refusal.status, refusal.message, refusal.type, code=refusal.code, retry_after=refusal.retry_after)


def own_fault(request_id: str) -> ApiError:
    """A mistake of the server's own, as the client is told of it."""
    return ApiError(500, f"The server failed; its log knows more of {request_id}")
