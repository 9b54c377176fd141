"""An application on a real socket of this machine, in the test's own event loop."""

from __future__ import annotations

from asyncio import create_task
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from abyssal.serve.app import front_of
from abyssal.serve.http.front import Front
from abyssal.serve.lifecycle import Lifecycle, listen, url_of


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    port: int
    front: Front
    lifecycle: Lifecycle


@asynccontextmanager
async def running(app: FastAPI, drain_seconds: float = 5.0) -> AsyncGenerator[Running, None]:
    """Until the block ends."""
    listener = listen("127.0.0.1", 0)
    lifecycle = Lifecycle(app, drain_seconds)
    serving = create_task(lifecycle.serve(listener))
    front = front_of(app)
    try:
        yield Running(url_of(listener), listener.getsockname()[1], front, lifecycle)
    finally:
        lifecycle.hurry()
        await serving
        await front.close()
