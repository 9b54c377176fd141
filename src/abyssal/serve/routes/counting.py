"""Tokens of another provider: its own count where it gives one, and an estimate until then.

The estimate is a token for each four bytes of text, which English comes to with today's tokenizers.  It decides what is
set aside of a balance, and what an answer costs that a client left half way; a whole answer costs what the provider
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abyssal.serve.events import Usage
from abyssal.serve.protocol.usage import usage_body

BYTES_A_TOKEN = 4
IMAGE_TOKENS = 1000
"""A picture, or a sound."""


def tokens_of(text: str) -> int:
    """About."""
    return -(-len(text.encode()) // BYTES_A_TOKEN)


class Estimate:
    """Usage of an answer as it grows."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._bytes = 0

    def add(self, body: Mapping[str, Any]) -> None:
        """What a chunk adds."""
        for choice in body.get("choices") or ():
            self._bytes += sum(len(text.encode()) for text in _texts(choice))

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, -(-self._bytes // BYTES_A_TOKEN))


def usage_of(given: Mapping[str, Any] | None) -> Usage | None:
    """As the provider counted; None where it did not."""
    if not given or given.get("prompt_tokens") is None:
        return None
    prompt, completion = _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    cached = _count(given.get("prompt_tokens_details") or {}, "cached_tokens") or _count(
        given, "prompt_cache_hit_tokens"
    )
    reasoning = _count(given.get("completion_tokens_details") or {}, "reasoning_tokens")
    return Usage(prompt, completion, min(cached, prompt), min(reasoning, completion))


def shown_usage(given: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    """This server's ``usage``, with what else the provider says of it."""
    shown = {**_known(given), **usage_body(usage)}
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        shown[name] = {**_known(given.get(name) or {}), **shown[name]}
    return shown


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return max(0, value) if isinstance(value, int) else 0


def _texts(choice: Mapping[str, Any]) -> list[str]:
    """Everything that the model wrote: content, reasoning, names and arguments of calls."""
    said = choice.get("delta") or choice.get("message") or {}
    calls = [call.get("function") or {} for call in said.get("tool_calls") or ()]
    texts = [choice.get("text"), said.get("content"), said.get("reasoning_content")]
    texts += [call.get(name) for call in calls for name in ("name", "arguments")]
    return [text for text in texts if isinstance(text, str)]
