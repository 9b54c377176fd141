"""Watches requests for metrics, the access log and traces: one clock and one set of times for all three."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.observe.figures import Figures, Times
from abyssal.serve.observe.logs import LOGGER
from abyssal.serve.observe.tracing import RequestSpan, Tracing
from abyssal.serve.observer import Arrival, Outcome
from abyssal.serve.service import Origin

MOST_TEXT = 20_000
"""Characters of a prompt or an answer in the log, where the operator asked for texts."""
Decode = Callable[[Sequence[int]], str]


class RequestObserver:
    """An :class:`~abyssal.serve.observer.Observer`.

    Args:
        tracing: None for no traces.
        decode: of a prompt's tokens: texts of prompts and answers go into the log.  None, the default, keeps them out.
        ticks: seconds that never run backwards; the clock of :attr:`Arrival.at`.
    """

    def __init__(
        self,
        figures: Figures,
        tracing: Tracing | None = None,
        decode: Decode | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.figures = figures
        self.tracing = tracing
        self.decode = decode
        self.ticks = ticks
        self.logger = logging.getLogger(f"{LOGGER}.requests")

    def begin(self, arrival: Arrival) -> RequestWatch:
        return RequestWatch(self, arrival)


class RequestWatch:
    """A :class:`~abyssal.serve.observer.Watch`."""

    def __init__(self, observer: RequestObserver, arrival: Arrival) -> None:
        self._observer = observer
        self._arrival = arrival
        self._prepared: Prepared | None = None
        self._queue: float | None = None
        self._first: float | None = None
        self._last: dict[int, float] = {}
        """When each choice's newest token came."""
        self._reasons: dict[int, str] = {}
        self._texts: dict[int, str] = {}
        self._gaps: list[tuple[float, int]] = []
        """Of a routed request, whose model is not known before its end."""
        tracing = observer.tracing
        ago = observer.ticks() - arrival.at
        self._span: RequestSpan | None = tracing.begin(arrival, ago) if tracing is not None else None

    def prepared(self, prepared: Prepared, origin: Origin) -> None:
        self._prepared = prepared
        self._model = self._observer.figures.model(prepared.model)
        if self._span is not None:
            self._span.prepared(operation(self._arrival.endpoint), prepared)

    def event(self, event: EngineEvent) -> None:
        now = self._observer.ticks()
        prepared = self._prepared
        choice = prepared.choice_of(event) if prepared is not None else 0
        count = len(event.token_ids) if prepared is not None else 1
        if event.began is not None and self._queue is None:
            self._begun(event.began, now)
        if count:
            self._tokens(choice, count, now)
        if event.finish_reason is not None:
            self._reasons[choice] = event.finish_reason
        if event.text and self._observer.decode is not None:
            self._texts[choice] = (self._texts.get(choice, "") + event.text)[:MOST_TEXT]

    def _begun(self, at: float, now: float) -> None:
        self._queue = max(0.0, at - self._arrival.at)
        if self._span is not None:
            self._span.prefill(max(0.0, now - at))

    def _tokens(self, choice: int, count: int, now: float) -> None:
        if self._first is None:
            self._first = now - self._arrival.at
            if self._span is not None:
                self._span.first_token()
            if self._prepared is not None:
                self._observer.figures.first_token(self._model, self._first)
        last = self._last.get(choice)
        self._last[choice] = now
        # Tokens that came with a choice's first have no time between: counts are tokens less one, however they came.
        gap, between = ((now - last) / count, count) if last is not None else (0.0, count - 1)
        if not between:
            return
        if self._prepared is not None:
            self._model.between_tokens.add(gap, between)
        elif len(self._gaps) < 100_000:
            self._gaps.append((gap, between))

    def end(self, outcome: Outcome) -> None:
        seconds = self._observer.ticks() - self._arrival.at
        figures = self._observer.figures
        figures.response(self._arrival.endpoint, outcome.status, seconds)
        if self._prepared is None and outcome.usage is not None:
            self._routed(outcome)
        if self._prepared is not None or outcome.usage is not None:
            figures.ended(self._model, self._reason(outcome), outcome, Times(seconds, self._first, self._queue))
        if self._span is not None:
            self._span.end(outcome, [self._reasons[choice] for choice in sorted(self._reasons)], self._first)
        self._log(outcome, seconds)

    def _routed(self, outcome: Outcome) -> None:
        self._model = self._observer.figures.model(outcome.model)
        if self._first is not None:
            self._observer.figures.first_token(self._model, self._first)
        for gap, count in self._gaps:
            self._model.between_tokens.add(gap, count)

    def _reason(self, outcome: Outcome) -> str:
        """Why it ended, of a request with several choices: the first choice's."""
        if outcome.disconnected:
            return "cancelled"
        if outcome.error:
            return "error"
        return next(iter(self._reasons.values()), "stop")

    def _log(self, outcome: Outcome, seconds: float) -> None:
        level = logging.WARNING if outcome.status >= 500 else logging.INFO
        logger = self._observer.logger
        if logger.isEnabledFor(level):
            logger.log(level, "request", extra={"fields": self._fields(outcome, seconds) | self._told()})

    def _fields(self, outcome: Outcome, seconds: float) -> dict[str, Any]:
        """None is left out of the log."""
        usage = outcome.usage
        return {
            "request_id": self._arrival.request_id,
            "path": self._arrival.endpoint,
            "status": outcome.status,
            "error": outcome.error or None,
            "disconnected": outcome.disconnected or None,
            "model": outcome.model[:200] or None,
            "key": self._arrival.key_name or None,
            "stream": outcome.stream or None,
            "finish": "+".join(dict.fromkeys(self._reasons.values())) or None,
            "prompt_tokens": usage and usage.prompt_tokens,
            "cached_tokens": usage and usage.cached_tokens,
            "output_tokens": usage and usage.completion_tokens,
            "reasoning_tokens": (usage and usage.reasoning_tokens) or None,
            "cost_nano": outcome.cost or None,
            "queue": None if self._queue is None else round(self._queue, 4),
            "first_token": None if self._first is None else round(self._first, 4),
            "seconds": round(seconds, 4),
        }

    def _told(self) -> dict[str, Any]:
        """Texts, where the operator asked for them."""
        if self._observer.decode is None or self._prepared is None:
            return {}
        prompts = [self._observer.decode(prompt)[:MOST_TEXT] for prompt in self._prepared.prompts]
        return {"prompts": prompts, "answers": [self._texts[choice] for choice in sorted(self._texts)]}


def operation(endpoint: str) -> str:
    """OpenTelemetry's word for what an endpoint does."""
    return "text_completion" if endpoint.endswith("/completions") and "/chat/" not in endpoint else "chat"
