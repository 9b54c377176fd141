"""Around everything the server answers: a request's id, headers that every response has, and who may call it by what
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abyssal.serve.http.connection import new_request_id
from abyssal.serve.http.dialect import JSON_TYPE, dialect_of, encode
from abyssal.serve.http.front import own_fault
from abyssal.serve.protocol.errors import ApiError

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "referrer-policy": "no-referrer",
}
"""Of pages that say nothing of their own."""


class Envelope:
    """The outermost layer.

    Args:
        report: told of a request's id and of what broke in it, outside of any exchange.
        draining: whether clients are to go elsewhere with their next request.
        hosts: names by which the server may be called; none is any.
    """

    def __init__(
        self,
        app: ASGIApp,
        report: Callable[[str, BaseException], None],
        draining: Callable[[], bool],
        hosts: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._report = report
        self._draining = draining
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        own = {"x-request-id": request_id, "x-content-type-options": "nosniff"}
        if scope["path"].startswith("/anthropic/"):
            own["request-id"] = request_id  # where Anthropic's clients look
        theirs = headers.get("x-request-id", "")
        if _CLIENT_ID.fullmatch(theirs):
            own["x-client-request-id"] = theirs

        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if self._draining():
                    own["connection"] = "close"
                _add_headers(message, own)
            await send(message)

        host = headers.get("host", "")
        if self._hosts and host_name(host) not in self._hosts:
            await _send_error(scope, sent, _misdirected(host))
            return
        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            self._report(request_id, error)
            if begun:
                raise
            await _send_error(scope, sent, own_fault(request_id))


def _add_headers(message: Message, own: Mapping[str, str]) -> None:
    head = MutableHeaders(scope=message)
    for name, value in own.items():
        head[name] = value
    if head.get("content-type", "").startswith("text/html"):
        for name, value in _PAGE_HEADERS.items():
            head.setdefault(name, value)


def host_name(host: str) -> str:
    """Of a header Host, without its port."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def _misdirected(host: str) -> ApiError:
    message = f"host: {host[:60]!r} is not a name of this server, which has no keys; call it localhost, or give it keys"
    return ApiError(421, message, param="host", code="misdirected_request")


async def _send_error(scope: Scope, send: Send, error: ApiError) -> None:
    raw = encode(dialect_of(scope["path"]).error(error))
    headers = [(b"content-type", JSON_TYPE.encode()), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": raw, "more_body": False})
