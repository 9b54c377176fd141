"""Metrics, logs, traces and the board of one server, put together.

seen = Observability(served.name, service, currency="USD")
app = create_app(..., observers=[seen.observer])
app.include_router(seen.router(operator=check_key))
async with seen.running():  # in the app's lifespan
    ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import APIRouter

from abyssal.serve.observe.board import Board
from abyssal.serve.observe.feed import BoardFeed
from abyssal.serve.observe.figures import Figures
from abyssal.serve.observe.metrics import Metrics
from abyssal.serve.observe.routes import Check, Recorder, keyed, observe_router
from abyssal.serve.observe.totals import EngineTotals
from abyssal.serve.observe.tracing import Tracing
from abyssal.serve.observe.watch import Decode, RequestObserver
from abyssal.serve.observe.watched import Watched


class Observability:
    """Of one server.

    Args:
        model: as it is served.
        currency: of prices; None where every price is 0.
        tracing: None for no OpenTelemetry.
        decode: of a prompt's tokens, where texts are to be logged; None keeps them out of the log.
        clock: seconds since the epoch.
        ticks: seconds that never run backwards.
    """

    def __init__(
        self,
        model: str,
        service: Watched,
        currency: str | None = None,
        tracing: Tracing | None = None,
        decode: Decode | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        figures, totals = Figures(ticks), EngineTotals()
        self._tracing = tracing
        self.observer = RequestObserver(figures, tracing, decode, ticks)
        self.metrics = Metrics(model, service, totals, figures, currency)
        self.board = Board(model, service, totals, figures, currency, clock, ticks)
        self.feed = BoardFeed(self.board)

    def router(self, operator: Check = keyed, scraper: Check = keyed, record: Recorder | None = None) -> APIRouter:
        """``/metrics``, ``/board``, ``/board/events`` and, with ``record``, ``/debug/trace``."""
        return observe_router(self.metrics, self.board, self.feed, operator, scraper, record)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """While the server runs; after it, whoever looks at the board is let go, and the last spans are sent."""
        task = asyncio.create_task(self.feed.run(), name="board")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
