"""Bodies of errors, and the field at fault found in messages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from abyssal.serve.protocol.errors import MOST_MESSAGE, ApiError, of_value_error


def test_shapes() -> None:
    error = ApiError(422, "top_p: too high", param="top_p", code="invalid_value")
    assert error.openai() == {
        "error": {
            "message": "top_p: too high",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_value",
        }
    }
    assert error.anthropic() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "top_p: too high"},
    }


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (401, "authentication_error", "authentication_error"),
        (402, "insufficient_balance", "billing_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
    ],
)
def test_types_follow_the_status(status: int, openai: str, anthropic: str) -> None:
    error = ApiError(status, "x")
    assert error.openai()["error"]["type"] == openai
    assert error.anthropic()["error"]["type"] == anthropic


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("messages[2].content: missing", "messages[2].content"),
        ("tools[0].function.name: 'x' is bad", "tools[0].function.name"),
        ("the tokenizer has no token", None),
        ("", None),
    ],
)
def test_the_field_leads_the_message(message: str, param: str | None) -> None:
    assert of_value_error(ValueError(message)).param == param


def test_long_messages_are_cut() -> None:
    assert len(ApiError(422, "x" * 10**6).message) == MOST_MESSAGE
    json.dumps(ApiError(422, "x" * 10**6).openai())


def test_no_torch() -> None:
    modules = ", ".join(f"abyssal.serve.protocol.{name}" for name in ("chat", "chat_reply", "completions"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
