"""LiteLLM's answers in the shape of OpenAI's, without the names that it adds to each and leaves empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEPT_EMPTY = frozenset({"content", "refusal", "logprobs", "finish_reason", "system_fingerprint"})
"""What OpenAI's own answers have as null."""


def tidy(body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A whole answer or a chunk, without usage, under the name that the client asked for."""
    shown = _without_empty({**body, "model": model, "usage": None, "choices": None})
    return {**shown, "choices": [_choice(choice) for choice in body.get("choices") or ()]}


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    shown = _without_empty(choice)
    if "delta" in choice:
        delta = _without_empty(choice["delta"] or {})
        shown["delta"] = {name: value for name, value in delta.items() if value is not None}
    if "message" in choice:
        shown["message"] = {"content": None, **_without_empty(choice["message"] or {})}
    if "text" in choice:
        shown["text"] = choice["text"] or ""
    shown.setdefault("logprobs", None)
    return shown


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in _KEPT_EMPTY or (value is not None and value != {})}
