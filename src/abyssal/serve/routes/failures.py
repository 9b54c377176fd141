"""What went wrong at another provider, as this server's client is told.

=====================================  ======  =====================================================
at the provider                        status  code
=====================================  ======  =====================================================
the request is wrong (400, 409, 422)   same    ``provider_refused_request``, the provider's words
too long for the model (400)           400     ``context_length_exceeded``, the provider's words
a parameter that it does not have      422     ``unsupported_parameter``, LiteLLM's words
too large (413)                        413     ``provider_refused_request``
no such model or provider (404)        404     ``model_not_found``
too many requests (429)                429     ``provider_rate_limited``, its Retry-After
the operator's key or money (401-403)  502     ``provider_refused_server``
it is overloaded (503)                 503     ``provider_overloaded``, its Retry-After
it failed, or cannot be reached        502     ``provider_failed``
no answer in time (408, 504)           504     ``provider_timeout``
=====================================  ======  =====================================================

A provider's 401 is between it and the operator: passed on, it would tell the client that *its* key is wrong.  Words are
the provider's only where they are about the request; others may quote keys, addresses and accounts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from abyssal.serve.protocol.errors import ApiError

log = logging.getLogger("abyssal.serve.routes")

_REFUSED = (400, 409, 413, 415, 422)
_TIMEOUT = (408, 504)
_UNKNOWN = "LLM Provider NOT provided"
_PREFIX = re.compile(r"^(?:litellm\.)?(?:\w+(?:Error|Exception)\s*(?::|-)\s*)+")
_QUOTA = re.compile(r"insufficient.(?:quota|balance|credit|funds)|billing|payment", re.IGNORECASE)


def of_failure(error: Exception, model: str) -> ApiError:
    """Of whatever LiteLLM raised."""
    status = _status(error)
    said = _said(error)
    if status in (401, 402, 403) or (status in (400, 429) and _QUOTA.search(f"{said.get('code')} {said.get('type')}")):
        log.error("the provider of a model refused this server", extra={"fields": {"model": model, "status": status}})
        message = f"The provider of {model!r} refused this server, not your key; its operator has to see to it"
        return ApiError(502, message, code="provider_refused_server")
    if status == 404 or _UNKNOWN in str(error)[:300]:
        message = f"The provider has no model {model!r}"
        return ApiError(404, message, "invalid_request_error", "model", "model_not_found")
    if status in _REFUSED:
        return _refused(error, status, said)
    if status == 429:
        message = f"The provider of {model!r} takes no more requests now; try again later"
        return ApiError(429, message, code="provider_rate_limited", retry_after=_retry_after(error))
    return _failed(error, status, model)


def timed_out(model: str) -> ApiError:
    """It is too late."""
    return ApiError(504, f"The provider of {model!r} did not answer in time", code="provider_timeout")


def _refused(error: Exception, status: int, said: Mapping[str, Any]) -> ApiError:
    kind = type(error).__name__
    if kind == "UnsupportedParamsError":
        return ApiError(422, _words(error).partition(". To drop these")[0], code="unsupported_parameter")
    too_long = kind == "ContextWindowExceededError" or said.get("code") == "context_length_exceeded"
    code = "context_length_exceeded" if too_long else "provider_refused_request"
    param = said.get("param")
    message = f"The provider refused the request: {_words(error)}"
    return ApiError(status, message, param=param if isinstance(param, str) else None, code=code)


def _failed(error: Exception, status: int, model: str) -> ApiError:
    fields = {"model": model, "status": status, "error": type(error).__name__}
    log.warning("the provider of a model failed", extra={"fields": fields})
    if status in _TIMEOUT:
        return timed_out(model)
    if status == 503 and type(error).__name__ != "MidStreamFallbackError":
        message = f"The provider of {model!r} is overloaded; try again later"
        return ApiError(503, message, code="provider_overloaded", retry_after=_retry_after(error))
    return ApiError(502, f"The provider of {model!r} failed, or cannot be reached", code="provider_failed")


def _status(error: Exception) -> int:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else 500


def _said(error: Exception) -> Mapping[str, Any]:
    """The provider's own body, where it is of OpenAI's shape."""
    body = getattr(error, "body", None)
    return body if isinstance(body, Mapping) else {}


def _words(error: Exception) -> str:
    """The provider's own message, without the names that LiteLLM puts before it, on one line."""
    text: Any = getattr(error, "message", None) or str(error)
    return " ".join(_PREFIX.sub("", str(text)).split())


def _retry_after(error: Exception) -> int | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("retry-after", ""))
    return int(value) if value.isdecimal() and len(value) < 6 else None
