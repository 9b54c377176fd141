"""Errors as a caller of the API sees them: a status, one sentence, and the name of the parameter at fault.

=======  ==============================================================================
status   meaning
=======  ==============================================================================
400      no JSON object, or a prompt beyond the model's length
401      no key, or an unknown one
402      the balance is spent
404      no such model or path
405      a method that the path does not have
408      the request came too slowly
413      the body is too large
415      the body is not JSON by its header
422      a parameter is unknown, not supported, or has a value that cannot be
429      too many requests
500      the server's own fault
502      another provider failed, or refused this server (:mod:`abyssal.serve.routes.failures`)
503      it is starting, draining or overloaded
504      another provider did not answer in time
=======  ==============================================================================

The statuses are DeepSeek's; the body is OpenAI's, whose clients make an exception of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

PARAMETER_STATUS = 422
MOST_NAME = 80
"""Characters of the name of an unknown parameter."""
MOST_MESSAGE = 1000
"""Characters of a message: it may quote the request."""

_FIELD = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*(?=: )")
_TYPES = {401: "authentication_error", 402: "insufficient_balance", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A refusal or a failure, with all that its body says."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """
        Args:
            type: OpenAI's kind of error; by default of the status.
            param: the parameter at fault, such as ``messages[2].content``.
            code: for programs, such as ``context_length_exceeded``.
            retry_after: whole seconds after which another try may succeed: the header Retry-After.
        """
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MOST_MESSAGE else message[: MOST_MESSAGE - 3] + "..."
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def renamed(self, ours: str, theirs: str) -> ApiError:
        """The same about a parameter that the caller knows by another name; itself where it is about something else."""
        if not self.message.startswith(f"{ours}:"):
            return self
        message = theirs + self.message.removeprefix(ours)
        param = None if self.param is None else theirs
        return ApiError(self.status, message, self.type, param, self.code, self.retry_after)

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape, which is DeepSeek's too."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def bad_parameter(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A parameter that cannot be as it is."""
    return ApiError(PARAMETER_STATUS, f"{param}: {message}", param=param, code=code)


def not_supported(param: str, hint: str) -> ApiError:
    """A parameter of the API that this server does not have."""
    return bad_parameter(param, f"not supported; {hint}", "unsupported_parameter")


def too_long(num_prompt: int, num_new: int, most: int) -> ApiError:
    """The prompt, or prompt and ``max_tokens`` together, exceed the model's length.  All in tokens."""
    message = (
        f"This model's maximum context length is {most} tokens. However, you requested {num_prompt + num_new} tokens "
        f"({num_prompt} in the prompt, {num_new} in the completion). Shorten one of them."
    )
    return ApiError(400, message, param="max_tokens" if num_prompt < most else None, code="context_length_exceeded")


def far_too_long(num_prompt: int, most: int) -> ApiError:
    """The prompt exceeds the model's length by so much that its tokens were not counted."""
    message = (
        f"This model's maximum context length is {most} tokens. However, your prompt has at least {num_prompt} tokens. "
        "Shorten it."
    )
    return ApiError(400, message, code="context_length_exceeded")


def unknown_parameter(*location: str | int) -> ApiError:
    """The request has a field that the API does not know, whose name may be any text."""
    *outer, name = location
    shown = (str(name) if str(name).isidentifier() else repr(name))[:MOST_NAME]
    where = f"{_where(outer)}.{shown}" if outer else shown
    return bad_parameter(where, "unknown parameter; remove it", "unknown_parameter")


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """The request names a model that is not served."""
    message = f"The model {name!r} does not exist here; there is {', '.join(known)}"
    return ApiError(404, message, "invalid_request_error", "model", "model_not_found")


def of_value_error(error: ValueError) -> ApiError:
    """Of an error whose message is led by the field at fault, as those of ``text`` and of ``SamplingParams`` are."""
    found = _FIELD.match(str(error))
    return ApiError(
        PARAMETER_STATUS, str(error), param=found.group() if found is not None else None, code="invalid_value"
    )


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that a schema found wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = _where(first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_parameter(*first["loc"])
    if first["type"] == "missing":
        return bad_parameter(where, "missing; give it", "missing_required_parameter")
    text = first["msg"].removeprefix("Value error, ")
    return bad_parameter(where, text[:1].lower() + text[1:]) if where else of_value_error(ValueError(text))


def _where(location: Sequence[int | str]) -> str:
    """``a.b[1]`` without the names that pydantic gives the members of a union."""
    shown = ""
    for part in location:
        if isinstance(part, int):
            shown += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            shown += f".{part}" if shown else part
    return shown
