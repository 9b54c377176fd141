"""The page at ``/``: its files, read once, and the headers that keep it what it is.

The content security policy allows scripts, styles and connections from this server alone and nothing inline, and has
the browser refuse text as markup (trusted types), so that no answer of a model can become part of the page's code.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",  # ask whether it is still the same: a newer server has a newer page
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class _File:
    """One file of the page."""

    def __init__(self, body: bytes, kind: str) -> None:
        self.body = body
        self.kind = kind
        self.tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.kind, headers=headers)


def page_files() -> dict[str, bytes]:
    """By name: what is beside this file and of a kind that browsers are sent."""
    folder = files(__package__ or "abyssal.serve.web")
    found = [entry for entry in folder.iterdir() if f".{entry.name.rpartition('.')[2]}" in _TYPES]
    return {entry.name: entry.read_bytes() for entry in found}


def page_router() -> APIRouter:
    """``/`` and ``/web/NAME``.  No key is asked for: they hold nothing but the page itself."""
    router = APIRouter(include_in_schema=False)
    held = {name: _File(body, _TYPES[f".{name.rpartition('.')[2]}"]) for name, body in page_files().items()}

    @router.get("/")
    async def page(request: Request) -> Response:
        return held["index.html"].response(request)

    @router.get("/web/{name}")
    async def part(name: str, request: Request) -> Response:
        file = held.get(name)
        return Response(status_code=404, headers=HEADERS) if file is None else file.response(request)

    return router
