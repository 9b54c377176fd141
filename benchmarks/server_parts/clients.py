"""Clients that stream answers over HTTP, and when each token came.

A client reads its socket by itself: a library would take longer over a chunk than the server does, on the same cores.
A request's first token is there when its first chunk is; how many tokens it had is told by the usage at the end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_parts.load import Job, Served, summary
from engine_parts.statistics import percentiles

from .process import NAME


@dataclass
class Measured:
    """What one request got, and the seconds between one of its chunks and the next."""

    served: Served
    gaps: list[float] = field(default_factory=list)


def closed_load(port: int, jobs: Sequence[Job], clients: int) -> list[Measured]:
    """``clients`` that each send their next request when their last is answered, until there are no more."""

    async def load() -> list[Measured]:
        waiting, begin = deque(jobs), time.perf_counter()
        measured: list[Measured] = []

        async def client() -> None:
            while waiting:
                measured.append(await ask(port, waiting.popleft(), begin))

        await asyncio.gather(*(client() for _ in range(clients)))
        return measured

    return asyncio.run(load())


async def ask(port: int, job: Job, begin: float) -> Measured:
    """One request, on a connection of its own.

    Raises:
        RuntimeError: it was not answered whole.
    """
    body = {
        "model": NAME,
        "prompt": list(job.prompt),
        "max_tokens": job.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    measured = Measured(Served(time.perf_counter() - begin, len(job.prompt)))
    served, usage = measured.served, None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(_request(json.dumps(body).encode()))
        async for event in _events(reader):
            usage = event["usage"] or usage
            if not event["choices"]:
                continue
            at = time.perf_counter() - begin
            if served.first:
                measured.gaps.append(at - served.last)
            served.first, served.last = served.first or at, at
    finally:
        writer.close()
    if usage is None or usage["completion_tokens"] != job.new_tokens:
        raise RuntimeError(f"a request was not answered whole: {usage}")
    served.tokens, served.cached = usage["completion_tokens"], usage["prompt_cache_hit_tokens"]
    return measured


def _request(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"a request was refused: {status!r} {(await reader.read())[-500:]!r}")
    while line := await reader.readline():  # chunks' sizes and headers are passed over with what else is no event
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"a request failed: {event}")
            yield event


def load_summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """The engine benchmark's, with the gaps between chunks of all requests together."""
    gaps = [gap for each in measured for gap in each.gaps]
    served = sorted((each.served for each in measured), key=lambda each: each.arrival)
    return {**summary(served), "gap_seconds": percentiles(gaps)}
