"""A response on its way out: its head is sent as late as can be, since its status cannot be taken back.

Whoever waits longer than ``keep_alive_seconds`` gets a sign of life, and with it status 200: a comment of a stream, or
an empty line before a plain answer, as DeepSeek's API does.  An error behind it is an event of the stream; behind empty
lines it is the body all the same, and the connection is then broken off, so that no client takes it for an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Scope, Send

from abyssal.serve.http.body import ClientGone
from abyssal.serve.http.connection import CONNECTION
from abyssal.serve.http.dialect import EMPTY_LINE, JSON_TYPE, KEEP_ALIVE, STREAM_TYPE, Dialect, encode
from abyssal.serve.protocol.errors import ApiError

_STREAM_HEADERS = {"content-type": STREAM_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"}
_PLAIN_HEADERS = {"content-type": JSON_TYPE, "cache-control": "no-store"}


class Output:
    """Of one request.

    Args:
        write_seconds: for the client to take what it was sent.
    """

    def __init__(self, scope: Scope, send: Send, dialect: Dialect, write_seconds: float) -> None:
        self._scope = scope
        self._send = send
        self._dialect = dialect
        self._write_seconds = write_seconds
        self._stream = False
        self._events = 0
        self.sending = False
        """Amid a stream: whether the client has yet to take what it was sent; whoever writes one watches over that."""
        self.status: int | None = None
        """None before the head is sent."""

    async def keep_alive(self, stream: bool) -> None:
        """A sign of life."""
        await self._begin(stream)
        await self._amid(KEEP_ALIVE if stream else EMPTY_LINE)

    async def events(self, bodies: list[Mapping[str, object]]) -> None:
        """Of a stream."""
        await self._begin(True)
        self._events += len(bodies)
        await self._amid(b"".join(map(self._dialect.event, bodies)))

    async def end_stream(self) -> None:
        """A whole one."""
        await self._begin(True)
        await self._write(self._dialect.done, last=True)

    async def body(self, body: Mapping[str, object]) -> None:
        """A plain answer."""
        raw = encode(body)
        if self.status is None:
            await self._head(200, {**_PLAIN_HEADERS, "content-length": str(len(raw))})
        await self._write(raw, last=True)

    async def error(self, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
        """Instead of an answer, or behind a part of one."""
        raw = encode(self._dialect.error(error))
        if self.status is None:
            length = {"content-length": str(len(raw))}
            await self._head(error.status, {**_PLAIN_HEADERS, **error_headers(error), **(headers or {}), **length})
            await self._write(raw, last=True)
        elif self._stream:
            await self._write(self._dialect.error_event(error, self._events), last=True)
        else:
            await self._break_off(raw)

    async def abort(self) -> None:
        """The client is gone, or counts as gone: what it has not taken would keep the connection."""
        await self._end_connection("abort")

    async def _break_off(self, raw: bytes) -> None:
        await self._write(raw, last=CONNECTION not in self._scope.get("extensions", {}))
        await self._end_connection("close")

    async def _end_connection(self, how: str) -> None:
        ends = self._scope.get("extensions", {}).get(CONNECTION)
        if ends is not None:
            ends[how]()
            await asyncio.sleep(0)  # in which the server learns of it

    async def _begin(self, stream: bool) -> None:
        if self.status is None:
            self._stream = stream
            await self._head(200, _STREAM_HEADERS if stream else _PLAIN_HEADERS)

    async def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._within({"type": "http.response.start", "status": status, "headers": pairs})

    async def _amid(self, data: bytes) -> None:
        self.sending = True
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:
            raise ClientGone from None
        finally:
            self.sending = False

    async def _write(self, data: bytes, last: bool = False) -> None:
        await self._within({"type": "http.response.body", "body": data, "more_body": not last})

    async def _within(self, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


def error_headers(error: ApiError) -> dict[str, str]:
    """What an error says in its response's head."""
    headers: dict[str, str] = {}
    if error.retry_after is not None or error.status == 503:
        headers["retry-after"] = str(error.retry_after or 1)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413, 415):
        headers["connection"] = "close"  # what is left of the body is not read
    return headers
