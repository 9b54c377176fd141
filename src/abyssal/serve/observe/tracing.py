"""OpenTelemetry: a span a request, with the semantic conventions' names for generative AI.

An option (``abyssal[tracing]``): the libraries are imported when a server with ``--otlp-endpoint`` starts.  The tracer
belongs to one server; the process-wide one is left alone.  A caller's W3C ``traceparent`` makes the span a part of its
trace.  Neither prompts nor answers are recorded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from abyssal.engine.messages import SamplingParams
from abyssal.serve.events import Prepared, Usage
from abyssal.serve.observer import Arrival, Outcome

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

SECONDS = 5
"""For a collector to take spans, other tries included: a server that ends waits as long for one that is gone."""
_DEFAULTS = SamplingParams()
_PARAMETERS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "n": "gen_ai.request.choice.count",
}


class Tracing:
    """Spans of one server.

    Args:
        exporter: where spans go; :func:`otlp_exporter` for a collector.
        at_once: export each span when it ends, instead of in batches: for tests.
    """

    def __init__(self, exporter: SpanExporter, at_once: bool = False) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "abyssal", "service.version": version("abyssal")})
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("abyssal.serve", version("abyssal"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, arrival: Arrival, ago: float = 0.0) -> RequestSpan:
        """A request came, ``ago`` seconds before now."""
        from opentelemetry.trace import SpanKind

        caller = {"traceparent": arrival.traceparent, "tracestate": arrival.tracestate}
        parent = self._propagator.extract({name: value for name, value in caller.items() if value})
        span = self._tracer.start_span(
            f"POST {arrival.endpoint}",
            parent,
            SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": arrival.endpoint,
                "abyssal.request_id": arrival.request_id,
            },
            start_time=_moment(ago),
        )
        return RequestSpan(span)

    def close(self) -> None:
        """Send what is left.  Takes seconds where the collector does not answer: not for an event loop."""
        self._provider.shutdown()


@dataclass
class RequestSpan:
    """The span of one request."""

    span: Span

    def prepared(self, operation: str, prepared: Prepared) -> None:
        """The request was read, and waits for the engine."""
        self.span.update_name(f"{operation} {prepared.model}")
        params = prepared.params
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "abyssal",
            "gen_ai.request.model": prepared.model,
            "gen_ai.request.stream": prepared.stream,
        }
        for name, attribute in _PARAMETERS.items():
            value = getattr(params, name)
            if value is not None and (value != getattr(_DEFAULTS, name) or name == "max_tokens"):
                attributes[attribute] = value
        if params.stop:
            attributes["gen_ai.request.stop_sequences"] = list(params.stop)
        self.span.set_attributes(attributes)
        self.span.add_event("queued")

    def prefill(self, ago: float) -> None:
        """The engine began with the prompt, ``ago`` seconds before now."""
        self.span.add_event("prefill", timestamp=_moment(ago))

    def first_token(self) -> None:
        """The prompt is computed; from here on it is decoding."""
        self.span.add_event("decode")

    def end(self, outcome: Outcome, reasons: Sequence[str], first_token: float | None) -> None:
        """The response is over.

        Args:
            first_token: seconds after the request came; None for none.
        """
        from opentelemetry.trace import Status, StatusCode

        attributes: dict[str, Any] = {"http.response.status_code": outcome.status}
        if outcome.model:
            attributes |= {"gen_ai.request.model": outcome.model, "gen_ai.response.model": outcome.model}
        if reasons:
            attributes["gen_ai.response.finish_reasons"] = list(reasons)
        if outcome.usage is not None:
            attributes |= _usage(outcome.usage)
        if first_token is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = first_token
        if outcome.disconnected:
            attributes["abyssal.disconnected"] = True
        if outcome.error:
            attributes["error.type"] = outcome.error
        self.span.set_attributes(attributes)
        if outcome.status >= 500 or (outcome.error and outcome.status < 400):
            # A server's span fails of the server's own faults alone, such as those amid an answer.
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
    }


def _moment(ago: float) -> int:
    return time.time_ns() - int(ago * 1e9)


def otlp_exporter(endpoint: str) -> SpanExporter:
    """To a collector, by OTLP over HTTP.

    Args:
        endpoint: ``http://HOST:4318``; without a path, the usual ``/v1/traces`` is added.

    Raises:
        ValueError: no such URL, or the libraries are missing.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--otlp-endpoint: {endpoint!r} is no URL; give one such as http://127.0.0.1:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError("--otlp-endpoint needs OpenTelemetry: pip install 'abyssal[tracing]'") from None
    path = parts.path if parts.path not in ("", "/") else "/v1/traces"
    return OTLPSpanExporter(endpoint=parts._replace(path=path).geturl(), timeout=SECONDS)
