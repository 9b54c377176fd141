"""Tokens counted as they come, and usage in the shape that OpenAI's and DeepSeek's clients read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abyssal.serve.events import EngineEvent, Prepared, ThinkTokens, Usage


@dataclass
class ThinkCounter:
    """Tells an output's reasoning tokens from the others, token by token."""

    tokens: ThinkTokens | None
    thinking: bool = field(init=False)
    begun: bool = field(init=False, default=False)
    count: int = field(init=False, default=0)
    """Reasoning tokens so far, tags included."""

    def __post_init__(self) -> None:
        self.thinking = self.tokens is not None and self.tokens.open

    def push(self, token: int) -> bool:
        """Whether the next token belongs to reasoning."""
        if self.tokens is None:
            return False
        if not self.begun and not self.thinking:
            self.thinking = token == self.tokens.begin
        self.begun = True
        was = self.thinking
        self.count += was
        if token == self.tokens.end:
            self.thinking = False
        return was


class UsageCounter:
    """Usage of one request, from its events.

    A prompt counts once, however many choices it has; its cached tokens are those of the choice that had the most,
    since the others share what that one computed.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._cached = [0] * len(prepared.prompts)
        self._thinking = [ThinkCounter(prepared.think) for _ in range(prepared.num_choices)]
        self._completion = 0

    def push(self, event: EngineEvent) -> list[bool]:
        """Of each token of the event, whether it is reasoning."""
        self._cached[event.prompt] = max(self._cached[event.prompt], event.cached_tokens)
        if self._prepared.drop_output:
            return [False] * len(event.token_ids)
        self._completion += len(event.token_ids) + event.discarded_tokens
        thinking = self._thinking[self._prepared.choice_of(event)]
        return [thinking.push(token) for token in event.token_ids]

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=sum(map(len, self._prepared.prompts)),
            completion_tokens=self._completion,
            cached_tokens=sum(self._cached),
            reasoning_tokens=sum(thinking.count for thinking in self._thinking),
        )


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's ``usage`` with DeepSeek's cache fields."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.missed_tokens,
    }
