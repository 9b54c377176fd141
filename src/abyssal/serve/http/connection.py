"""uvicorn's connection, with the limits that it lacks: on the time and size of a request's head, and on connections.

A client that sends its head byte by byte gets 408 and is cut off; uvicorn itself would wait forever.  What is no HTTP
gets an error in OpenAI's shape, like everything else.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from abyssal.serve.http.dialect import OPENAI, encode
from abyssal.serve.protocol.errors import ApiError

CONNECTION = "abyssal.connection"
"""Of a scope's ``extensions``: ``close``, which ends the connection after what was written, and ``abort``, at once."""
HEADER_SECONDS = 10.0
HEADER_BYTES = 64 << 10
REST_BYTES = 64 << 20
"""Of a body that is still coming when its request was refused.  It is passed over, in as many seconds as a head has:
who is cut off while it sends may never see the answer."""
_SPARE_FILES = 128
"""File handles that connections leave to the rest of the process."""

_WANTED_FILES = 16_384


class Connection(HttpToolsProtocol):
    """One client's."""

    header_seconds = HEADER_SECONDS
    header_bytes = HEADER_BYTES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        """Of a head that is not complete."""
        self._body_comes = False
        """A head was complete, and its body is not."""
        self._rest_bytes = 0
        """Of a body that came after its answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            self._refuse(ApiError(503, "The server has as many connections as it can; try again later", retry_after=1))
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            if self._body_comes:
                self._rest_bytes += len(data)
            else:
                self._head_bytes += len(data)
            if self._timer is None:
                self._start_timer()
        super().data_received(data)
        if self._rest_bytes > REST_BYTES:
            self.transport.close()
        if self._head_bytes > self.header_bytes and not self.transport.is_closing():
            self._refuse(ApiError(431, f"The request's head is larger than {self.header_bytes} bytes; shorten it"))

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._head_bytes = 0
        ends = {"close": self.transport.close, "abort": self.transport.abort}
        self.scope["extensions"] = {CONNECTION: ends}  # type: ignore[typeddict-item]
        self._body_comes, self._rest_bytes = True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._body_comes = False
        if self.cycle is not None and self.cycle.response_complete:  # the connection waits for another request again
            self._stop_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._head_bytes == 0:  # nothing was sent, so nothing is answered
            self.transport.close()
            return
        self._refuse(ApiError(408, "The request's head came too slowly; send it again", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of any request, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.close()  # amid another answer
            return
        raw = encode(OPENAI.error(error))
        head = [
            STATUS_LINE[error.status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(raw),
            b"connection: close\r\n",
            b"x-request-id: %b\r\n" % new_request_id().encode(),
            *([b"retry-after: %d\r\n" % error.retry_after] if error.retry_after is not None else []),
            b"\r\n",
        ]
        self.transport.write(b"".join([*head, raw]))
        self.transport.close()


def new_request_id() -> str:
    """Nobody else's."""
    return f"req_{uuid4().hex}"


def most_connections() -> int:
    """As many as file handles allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - _SPARE_FILES) if soft != resource.RLIM_INFINITY else 1 << 20


def raise_file_limit() -> None:
    """As far as this process may: every connection is a file handle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
