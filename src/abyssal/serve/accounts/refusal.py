"""What a client is told when a key, a limit or a balance forbids a request."""

from __future__ import annotations

import math


class Refusal(Exception):
    """A request that is not served: 401 (key), 402 (balance) or 429 (limits).

    The HTTP layer renders it in the shape of its API; ``type`` and ``code`` are OpenAI's words.
    """

    def __init__(self, status: int, message: str, type: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.retry_after = retry_after
        """Whole seconds after which another try may succeed: the header Retry-After."""


def unauthorized(message: str) -> Refusal:
    return Refusal(401, message, "authentication_error", "invalid_api_key")


def unpaid(message: str) -> Refusal:
    return Refusal(402, message, "insufficient_quota", "insufficient_balance")


def too_many(message: str, seconds: float) -> Refusal:
    """``seconds`` are rounded up: a client that comes back when told to is not refused for a fraction."""
    return Refusal(429, message, "rate_limit_error", "rate_limit_exceeded", max(1, math.ceil(seconds)))
