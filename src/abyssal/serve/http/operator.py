"""Who may see how the server does: any key, or the operator's alone."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.keys import Account
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.http.front import of_refusal
from abyssal.serve.protocol.errors import ApiError

Check = Callable[[Request], None]


def any_key(desk: Desk) -> Check:
    """Raises ApiError: 401."""

    def check(request: Request) -> None:
        _account(desk, request)

    return check


def key_named(desk: Desk, name: str) -> Check:
    """Raises ApiError: 401, or 403 for another key."""

    def check(request: Request) -> None:
        if _account(desk, request).key_name != name:
            raise ApiError(403, "This is for the server's operator", "permission_error", code="not_the_operator")

    return check


def _account(desk: Desk, request: Request) -> Account:
    try:
        return desk.authenticate(request.headers.get("authorization"), request.headers.get("x-api-key"))
    except Refusal as refusal:
        raise of_refusal(refusal) from None
