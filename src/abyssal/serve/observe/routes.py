"""``/metrics``, ``/board``, ``/board/events`` and ``/debug/trace``.

All are the operator's: where the server has keys, they want one.  ``/metrics`` has a check of its own, as it holds sums
alone and an operator may open it to a scraper.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from abyssal.serve.observe.board import Board
from abyssal.serve.observe.feed import MOST_LISTENERS, BoardFeed
from abyssal.serve.observe.metrics import Metrics
from abyssal.serve.protocol.errors import ApiError

MOST_STEPS = 2000
"""Of one trace: some MB."""
MOST_SECONDS = 60.0
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Check = Callable[[Request], Awaitable[None]]
"""Raises an ApiError where the caller may not see it."""
Recorder = Callable[[int, float], Awaitable[bytes]]
"""Records steps, at most so many and for so many seconds: a trace in Chrome's JSON format."""


async def anybody(request: Request) -> None:
    """No key is asked for."""


def observe_router(
    metrics: Metrics,
    board: Board,
    feed: BoardFeed,
    operator: Check = anybody,
    scraper: Check = anybody,
    record: Recorder | None = None,
) -> APIRouter:
    """
    Args:
        operator: who may see the board and record traces.
        scraper: who may read metrics.
        record: None where the server records no traces: they tell how others' requests run.
    """
    router = APIRouter(tags=["operator"])

    @router.get("/metrics", summary="Prometheus' text")
    async def read_metrics(request: Request) -> Response:
        await scraper(request)
        # Not by the Accept header: in OpenMetrics the library writes vllm_ for vllm:, and nobody would find the names.
        return Response(
            generate_latest(metrics.registry), headers={**HEADERS, "Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        )

    @router.get("/board", summary="How the server stands, and the last minutes")
    async def read_board(request: Request) -> Response:
        await operator(request)
        return _json(board.snapshot())

    @router.get("/board/events", summary="The same as a stream", response_class=StreamingResponse)
    async def stream_board(request: Request) -> Response:
        await operator(request)
        if feed.listeners >= MOST_LISTENERS:
            raise ApiError(429, f"{MOST_LISTENERS} pages look at the board already; close some of them")
        return StreamingResponse(
            feed.events(), media_type="text/event-stream", headers={**HEADERS, "X-Accel-Buffering": "no"}
        )

    if record is not None:
        _add_trace(router, operator, record)
    return router


def _add_trace(router: APIRouter, operator: Check, record: Recorder) -> None:
    @router.post("/debug/trace", summary="Steps of the engine, for Perfetto")
    async def trace(
        request: Request,
        steps: int = Query(100, ge=1, le=MOST_STEPS),
        seconds: float = Query(10.0, gt=0, le=MOST_SECONDS),
    ) -> Response:
        await operator(request)
        headers = {**HEADERS, "Content-Disposition": 'attachment; filename="abyssal-trace.json"'}
        return Response(await record(steps, seconds), media_type="application/json", headers=headers)


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, separators=(",", ":")), media_type="application/json", headers=HEADERS)
