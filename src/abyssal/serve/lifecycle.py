"""A server's life: it listens while its model loads, answers, drains, and ends.

The first SIGTERM or SIGINT lets nobody in any more (503, also on ``/ready``), while requests that run are finished, for
``drain_seconds`` at most; the second ends them too.  Whoever is cut off is told so in the shape of its API, and is
charged for what it got.  The sockets stay open meanwhile: a load balancer that has not noticed yet gets a 503 that it
can pass on to another server, instead of a refused connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import AsyncExitStack
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from abyssal.serve.app import front_of
from abyssal.serve.http.connection import Connection

log = logging.getLogger("abyssal.serve")

_SETTLE_SECONDS = 5.0
_KEEP_ALIVE_SECONDS = 75
"""For which an idle connection is kept: longer than most clients and proxies do, so that they close it first."""


class Lifecycle:
    """Of one server.

    Args:
        drain_seconds: for requests that run to be finished.
    """

    def __init__(self, app: FastAPI, drain_seconds: float) -> None:
        self._app = app
        self._front = front_of(app)
        self._drain_seconds = drain_seconds
        self._ending = asyncio.Event()
        self._hurrying = asyncio.Event()

    def end(self) -> None:
        """Drain, and end."""
        if not self._ending.is_set():
            running = self._front.gate.running
            log.info("shutting down%s", f": {running} requests are finished first" if running else "")
        self._front.gate.drain()
        self._ending.set()

    def hurry(self) -> None:
        """End at once."""
        self.end()
        self._hurrying.set()

    def signalled(self) -> None:
        """SIGTERM or SIGINT."""
        (self.hurry if self._ending.is_set() else self.end)()

    async def serve(self, listener: socket.socket, open_ended: AsyncExitStack | None = None) -> None:
        """Serve until the end, by a signal or :meth:`end`.

        Args:
            open_ended: closed when all requests are done: ends responses that have no end of their own.
        """
        server = _Server(_config(self._app), self)
        serving = asyncio.create_task(server.serve([listener]))
        ending = asyncio.create_task(self._drained())
        try:
            await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
            if open_ended is not None:
                await open_ended.aclose()
        finally:
            ending.cancel()
            server.should_exit = True
            await serving

    async def _drained(self) -> None:
        """Wait for the end, and for all requests to be done."""
        await self._ending.wait()
        empty = asyncio.ensure_future(self._front.gate.empty())
        hurrying = asyncio.ensure_future(self._hurrying.wait())
        await asyncio.wait((empty, hurrying), timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not empty.done():
            log.warning("%d requests are cut off", self._front.gate.running)
            self._front.gate.cut_off()
            await asyncio.wait((empty,), timeout=_SETTLE_SECONDS)
            empty.cancel()


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to a lifecycle."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._lifecycle.signalled)


def _config(app: FastAPI) -> uvicorn.Config:
    options: dict[str, Any] = {
        "loop": "asyncio",
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": _KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": 2,
    }
    return uvicorn.Config(app, **options)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OSError: the port is in use, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ValueError(f"--host: {host!r} is no name or address that this machine knows") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    address = listener.getsockname()[0]
    return address == "::1" or address.startswith(("127.", "::ffff:127."))


def url_of(listener: socket.socket) -> str:
    """By which a browser here finds it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
