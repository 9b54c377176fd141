"""``/metrics``, ``/board``, ``/board/events`` and ``/debug/trace``.

All are the operator's: where the server has keys, they want one.  ``/metrics`` has a check of its own, as it holds sums
alone and an operator may open it to a scraper.  Traces cost the engine a little and show how others' requests run, so
there are none unless the server was started so (``record``).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from abyssal.serve.observe.board import Board
from abyssal.serve.observe.feed import MOST_LISTENERS, BoardFeed
from abyssal.serve.observe.metrics import Metrics
from abyssal.serve.protocol.errors import ApiError, bad_parameter

if TYPE_CHECKING:
    from abyssal.serve.http.front import Front

STEPS, MOST_STEPS = 100, 2000
"""Of one trace: by default, and at most (some MB)."""
SECONDS, MOST_SECONDS = 10.0, 60.0
"""For a trace's steps to come."""
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Check = Callable[[Request], None]
"""Raises an ApiError where the caller may not see it."""
Recorder = Callable[[int, float], Awaitable[bytes]]
"""Records steps, at most so many and for so many seconds: a trace in Chrome's JSON format."""


def keyed(request: Request) -> None:
    """Where the server has keys, the request has one of them."""
    _front(request).authenticate(request.headers)


def anybody(request: Request) -> None:
    """No key is asked for."""


def observe_router(
    metrics: Metrics,
    board: Board,
    feed: BoardFeed,
    operator: Check = keyed,
    scraper: Check = keyed,
    record: Recorder | None = None,
) -> APIRouter:
    """
    Args:
        operator: who may see the board and record traces.
        scraper: who may read metrics.
        record: None where the server records no traces.
    """
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    async def read_metrics(request: Request) -> Response:
        scraper(request)
        # Not by the Accept header: in OpenMetrics the library writes vllm_ for vllm:, and nobody would find the names.
        headers = {**HEADERS, "Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        return Response(generate_latest(metrics.registry), headers=headers)

    @router.get("/board")
    async def read_board(request: Request) -> Response:
        operator(request)
        return Response(msgspec.json.encode(board.snapshot()), media_type="application/json", headers=HEADERS)

    @router.get("/board/events")
    async def stream_board(request: Request) -> Response:
        operator(request)
        if feed.listeners >= MOST_LISTENERS:
            raise ApiError(429, f"{MOST_LISTENERS} pages look at the board already; close some of them")
        headers = {**HEADERS, "X-Accel-Buffering": "no"}
        # A board is no work that a server which ends would wait for.
        events = feed.events(lambda: _front(request).gate.draining)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    if record is not None:
        _add_trace(router, operator, record)
    return router


def _add_trace(router: APIRouter, operator: Check, record: Recorder) -> None:
    @router.post("/debug/trace")
    async def trace(request: Request) -> Response:
        operator(request)
        steps = int(_number(request, "steps", STEPS, MOST_STEPS))
        seconds = _number(request, "seconds", SECONDS, MOST_SECONDS)
        headers = {**HEADERS, "Content-Disposition": 'attachment; filename="abyssal-trace.json"'}
        return Response(await record(steps, seconds), media_type="application/json", headers=headers)


def _number(request: Request, name: str, default: float, most: float) -> float:
    """A number in the query, above 0; a whole one where the default is.

    Raises:
        ApiError: 422.
    """
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = type(default)(given)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise bad_parameter(name, f"{given[:40]!r} must be {kind} above 0, at most {most:g}")
    return value


def _front(request: Request) -> Front:
    return request.app.state.front
