"""A request's body: read in bounded time and memory, and taken for JSON by the letter.

What two readers could read in two ways is refused: text that is not UTF-8, numbers that are none (``NaN``), a name
twice in one object, and nesting deeper than any honest request's, which would exhaust whatever walks through it.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.types import Receive

from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.protocol.errors import ApiError

MOST_DEPTH = 128
"""Of arrays and objects inside each other."""
SMALL_BYTES = 128 << 10
_RATE = 64 << 10
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 64 << 20


class ClientGone(Exception):
    """The client left, or takes nothing any more."""


class Bodies:
    """Reads bodies, and knows how much memory all of them take."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._held = 0

    @asynccontextmanager
    async def read(self, headers: Mapping[str, str], receive: Receive) -> AsyncIterator[bytearray]:
        """The whole body, which takes memory until the block ends.

        Raises:
            ApiError: 408, 413, 415, or 503: there is no room for another large one.
            ClientGone: before its end.
        """
        check_type(headers)
        most = self._settings.body_bytes
        if _announced(headers) > most:
            if "expect" not in headers:  # who asks before sending has sent nothing
                await _drain(receive)
            raise _too_large(most)
        body = bytearray()
        try:
            await self._fill(body, receive)
            if len(body) > most:
                await _drain(receive)
                raise _too_large(most)
            yield body
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        """Up to the end, or past the limit."""
        try:
            async with asyncio.timeout(self._settings.body_seconds) as limit:
                deadline = limit.when() or 0.0
                async for chunk in _chunks(receive):
                    self._hold(body, chunk)
                    limit.reschedule(deadline + len(body) / _RATE)
                    if len(body) > self._settings.body_bytes:
                        return
        except TimeoutError:
            raise ApiError(408, "The body came too slowly; send it again", code="request_timeout") from None

    def _hold(self, body: bytearray, chunk: bytes) -> None:
        """Small ones always find room, so that large ones can crowd out nobody but each other."""
        if len(body) + len(chunk) > SMALL_BYTES and self._held + len(chunk) > self._settings.bodies_bytes:
            message = "The server is reading as many large bodies as it can; try again later"
            raise ApiError(503, message, code="server_overloaded", retry_after=1)
        body += chunk
        self._held += len(chunk)


def _announced(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def check_type(headers: Mapping[str, str]) -> None:
    """Whether the body is JSON by its header.  No body goes without: a page of another server could send it unasked.

    Raises:
        ApiError: 415.
    """
    kind, _, options = headers.get("content-type", "").lower().partition(";")
    name = kind.strip()
    if name != "application/json" and not (name.startswith("application/") and name.endswith("+json")):
        message = f"content-type: {name[:60]!r} is not read here; send application/json"
        raise ApiError(415, message, param="content-type", code="unsupported_media_type")
    charset = options.partition("charset=")[2].partition(";")[0].strip().strip('"')
    if charset not in ("", "utf-8", "utf8"):
        message = f"content-type: the charset {charset[:40]!r} is not read here; send UTF-8"
        raise ApiError(415, message, param="content-type", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        message = "content-encoding: compressed bodies are not read here; send it as it is"
        raise ApiError(415, message, param="content-encoding", code="unsupported_media_type")


def parse(raw: bytes | bytearray) -> Mapping[str, Any]:
    """The JSON object that a body is.

    Raises:
        ApiError: 400.
    """
    try:
        with _uncollected(len(raw)):
            value = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number)
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _invalid(f"it is nested deeper than {MOST_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:  # an integer of thousands of digits
        raise _invalid("a number is too long") from None
    if not isinstance(value, Mapping):
        raise _invalid("it must be an object")
    _check_depth(value)
    return value


@contextmanager
def _uncollected(num_bytes: int) -> Iterator[None]:
    """Look for no garbage meanwhile: amid the millions of values that a large body may hold there is none, and the
    search stops all threads for longer than to read them takes."""
    if num_bytes <= SMALL_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) != len(items):
        seen: set[str] = set()
        twice = next(name for name, _ in items if name in seen or seen.add(name))
        raise _invalid(f"an object has the name {_shown(twice)!r} twice")
    return made


def _no_number(text: str) -> Any:
    raise _invalid(f"{text} is no number")


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _invalid(f"{text[:40]} is too large a number")
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for each in level:
            children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        level = inner
    raise _invalid(f"it is nested deeper than {MOST_DEPTH} levels")


def _invalid(problem: str) -> ApiError:
    return ApiError(400, f"The body is no JSON that can be read here: {problem}", code="invalid_json")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most} bytes; shorten it", code="request_too_large")


def _shown(name: str) -> str:
    return name[:60].encode("utf-8", "replace").decode()


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        if body := message.get("body", b""):
            yield body
        if not message.get("more_body", False):
            return


async def _drain(receive: Receive) -> None:
    """Let a client that is still sending come to its end, within bounds: else it may never see the answer."""
    length = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in _chunks(receive):
                length += len(chunk)
                if length > _DRAIN_BYTES:
                    return
    except (TimeoutError, ClientGone):
        return
