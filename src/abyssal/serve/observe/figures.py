"""What the server's front counts itself: requests by model, their times and tokens, and HTTP responses."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from abyssal.serve.events import Usage
from abyssal.serve.observe.histogram import BETWEEN_TOKENS, FIRST_TOKEN, TOKENS, WHOLE_REQUEST, Histogram
from abyssal.serve.observer import Outcome

MOST_MODELS = 64
"""Models with figures of their own.  Names after a route's prefix are the caller's invention, and labels stay."""
OTHER = "other"
REASONS: Mapping[str, str] = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "abort",
    "error": "error",
}
"""How requests end, in vLLM's words."""
RECENT = 30.0
"""Seconds over which the board's time to a first token is a median."""


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds since it came."""

    whole: float
    """Until its end."""
    first_token: float | None = None
    """None where none came."""
    queue: float | None = None
    """Until the engine began with it; None where that is not known."""


@dataclass
class ModelFigures:
    """Of the requests of one model."""

    finished: Counter[str] = field(default_factory=Counter)
    """By vLLM's reason."""
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS))
    per_output_token: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS))
    """A request's mean between tokens."""
    queue: Histogram = field(default_factory=lambda: Histogram(WHOLE_REQUEST))
    """Before the engine began with it."""
    prefill: Histogram = field(default_factory=lambda: Histogram(WHOLE_REQUEST))
    """From there to its first token."""
    decode: Histogram = field(default_factory=lambda: Histogram(WHOLE_REQUEST))
    """From there to its end."""
    whole: Histogram = field(default_factory=lambda: Histogram(WHOLE_REQUEST))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    output_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    saved: int = 0
    """Billionths of the currency that the cache's hits saved callers."""
    charged: int = 0


class Figures:
    """Of one server.

    Args:
        ticks: seconds that never run backwards.
    """

    def __init__(self, ticks: Callable[[], float] = time.monotonic) -> None:
        self.models: dict[str, ModelFigures] = {}
        self.responses: Counter[tuple[str, int]] = Counter()
        """Of the endpoints that answer with a model's tokens, by route and status."""
        self.response_seconds: dict[str, Histogram] = {}
        """By route."""
        self._ticks = ticks
        self._recent: deque[tuple[float, float]] = deque(maxlen=1000)

    def model(self, name: str) -> ModelFigures:
        """Of a model; beyond :data:`MOST_MODELS` of them, of all others together."""
        if name not in self.models and len(self.models) >= MOST_MODELS:
            name = OTHER
        return self.models.setdefault(name, ModelFigures())

    def first_token(self, model: ModelFigures, seconds: float) -> None:
        """A request's first token came."""
        model.first_token.add(seconds)
        self._recent.append((self._ticks(), seconds))

    def ended(self, model: ModelFigures, reason: str, outcome: Outcome, times: Times) -> None:
        """A request that the engine or another provider had begun has ended.

        Args:
            reason: one of :data:`REASONS`.
        """
        usage = outcome.usage or Usage()
        model.finished[REASONS.get(reason, "error")] += 1
        model.whole.add(times.whole)
        model.prompt_tokens.add(usage.prompt_tokens)
        model.output_tokens.add(usage.completion_tokens)
        model.cached_tokens += usage.cached_tokens
        model.reasoning_tokens += usage.reasoning_tokens
        model.charged += outcome.cost
        model.saved += outcome.saved
        if times.first_token is None:
            return
        if usage.completion_tokens > 1:
            model.per_output_token.add((times.whole - times.first_token) / (usage.completion_tokens - 1))
        if times.queue is not None:
            model.queue.add(times.queue)
            model.prefill.add(times.first_token - times.queue)
            model.decode.add(times.whole - times.first_token)

    def response(self, endpoint: str, status: int, seconds: float) -> None:
        """A response was sent to its end, or broken off."""
        self.responses[endpoint, status] += 1
        self.response_seconds.setdefault(endpoint, Histogram(WHOLE_REQUEST)).add(seconds)

    def recent_first_token(self) -> float | None:
        """Median of the last :data:`RECENT` seconds; None without requests."""
        since = self._ticks() - RECENT
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
        return statistics.median(seconds for _, seconds in self._recent) if self._recent else None

    def between_tokens(self) -> tuple[float, int]:
        """Sum and number of all times between tokens so far."""
        histograms = [model.between_tokens for model in self.models.values()]
        return sum(one.sum for one in histograms), sum(one.count for one in histograms)

    @property
    def answered(self) -> int:
        """Requests that ended in any way."""
        return sum(model.finished.total() for model in self.models.values())

    @property
    def saved(self) -> int:
        """Billionths, of all models."""
        return sum(model.saved for model in self.models.values())
