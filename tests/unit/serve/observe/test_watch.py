"""Requests watched: their figures, their line in the log, their span."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from abyssal.engine.messages import SamplingParams
from abyssal.serve.events import EngineEvent, Prepared, Usage
from abyssal.serve.observe.figures import Figures
from abyssal.serve.observe.tracing import Tracing, otlp_exporter
from abyssal.serve.observe.watch import RequestObserver, operation
from abyssal.serve.observer import Arrival, Observer, Outcome
from abyssal.serve.service import Origin
from tests.support.watched import Clock

PARAMS = SamplingParams(temperature=0.5, max_tokens=9, stop=("END",), seed=3)
PREPARED = Prepared(((1, 2, 3),), PARAMS, "tiny", stream=True)
ARRIVAL = Arrival("req-1", "/v1/chat/completions", 1000.0, key_name="ada's laptop")
DONE = Outcome(200, model="tiny", stream=True, usage=Usage(3, 4, 2, 1), cost=7, saved=5)
ORIGIN = Origin("req-1", namespace="ns", user="ada")


def tokens(*ids: int, text: str = "", **values: object) -> EngineEvent:
    return EngineEvent(token_ids=ids, text=text, **values)  # pyright: ignore[reportArgumentType]


def serve(observer: RequestObserver, clock: Clock, outcome: Outcome = DONE, arrival: Arrival = ARRIVAL) -> None:
    """A request that waits for 0.2 s; its first token comes 0.3 s later, two after 0.2 s more, the last after 0.1 s."""
    watch = observer.begin(arrival)
    watch.prepared(PREPARED, ORIGIN)
    for pause, event in (
        (0.5, tokens(5, text="secret", began=1000.2)),
        (0.2, tokens(6, 7, text=" answer")),
        (0.1, tokens(8, finish_reason="stop")),
    ):
        clock.now += pause
        watch.event(event)
    watch.end(outcome)


def observer_of(**options: object) -> tuple[RequestObserver, Clock, Figures]:
    clock = Clock()
    figures = Figures(clock)
    observer = RequestObserver(figures, ticks=clock, **options)  # pyright: ignore[reportArgumentType]
    _: Observer = observer
    return observer, clock, figures


def test_times_are_of_the_tokens() -> None:
    observer, clock, figures = observer_of()
    serve(observer, clock)
    model = figures.models["tiny"]
    assert (model.first_token.count, model.first_token.sum) == (1, pytest.approx(0.5))
    # Two tokens that came together came every 0.1 s.
    assert (model.between_tokens.count, model.between_tokens.sum) == (3, pytest.approx(0.3))
    assert model.per_output_token.sum == pytest.approx(0.1)
    assert model.whole.sum == pytest.approx(0.8)
    assert (model.queue.sum, model.prefill.sum, model.decode.sum) == pytest.approx((0.2, 0.3, 0.3))
    assert (model.cached_tokens, model.reasoning_tokens, model.charged, model.saved) == (2, 1, 7, 5)
    assert model.finished == {"stop": 1}
    assert figures.responses == {("/v1/chat/completions", 200): 1}


def test_choices_have_their_own_times_between_tokens() -> None:
    observer, clock, figures = observer_of()
    watch = observer.begin(ARRIVAL)
    watch.prepared(replace(PREPARED, params=SamplingParams(n=2)), ORIGIN)
    for _ in range(2):
        clock.now += 1
        watch.event(tokens(1))
        watch.event(tokens(1, choice=1))
    watch.end(DONE)
    between = figures.models["tiny"].between_tokens
    assert (between.count, between.sum) == (2, 2.0)


def test_tokens_that_came_with_the_first_have_no_time_between_them() -> None:
    observer, clock, figures = observer_of()
    watch = observer.begin(ARRIVAL)
    watch.prepared(PREPARED, ORIGIN)
    for ids in ((1, 2, 3), (4, 5)):
        clock.now += 1
        watch.event(tokens(*ids))
    watch.end(DONE)
    between = figures.models["tiny"].between_tokens
    assert (between.count, between.sum) == (4, 1.0)
    assert between.counts[0] == 2


def test_a_client_that_left_and_an_error_are_told_apart() -> None:
    observer, clock, figures = observer_of()
    serve(observer, clock, replace(DONE, disconnected=True))
    serve(observer, clock, replace(DONE, error="engine_died"))
    assert figures.models["tiny"].finished == {"abort": 1, "error": 1}


def test_a_refused_request_has_a_response_and_no_model() -> None:
    observer, _, figures = observer_of()
    observer.begin(ARRIVAL).end(Outcome(404, error="model_not_found", model="<whatever the caller wrote>"))
    assert figures.models == {}
    assert figures.responses == {("/v1/chat/completions", 404): 1}


def test_a_routed_request_is_known_by_its_outcome() -> None:
    observer, clock, figures = observer_of()
    watch = observer.begin(ARRIVAL)
    for _ in range(3):
        clock.now += 1
        watch.event(EngineEvent())
    watch.end(Outcome(200, model="elsewhere/x", usage=Usage(5, 6, 0, 0)))
    model = figures.models["elsewhere/x"]
    assert (model.first_token.sum, model.between_tokens.count, model.prompt_tokens.sum) == (1.0, 2, 5)


def test_the_log_has_a_line_a_request_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    observer, clock, _ = observer_of()
    with caplog.at_level(logging.INFO, "abyssal.serve"):
        serve(observer, clock)
    (record,) = caplog.records
    fields = {name: value for name, value in record.fields.items() if value is not None}  # pyright: ignore
    assert fields == {
        "request_id": "req-1",
        "path": "/v1/chat/completions",
        "status": 200,
        "model": "tiny",
        "key": "ada's laptop",
        "stream": True,
        "finish": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "output_tokens": 4,
        "reasoning_tokens": 1,
        "cost_nano": 7,
        "queue": 0.2,
        "first_token": 0.5,
        "seconds": 0.8,
    }
    assert "secret" not in str(vars(record))


def test_texts_are_logged_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    observer, clock, _ = observer_of(decode=lambda ids: f"<{len(ids)} tokens>")
    with caplog.at_level(logging.INFO, "abyssal.serve"):
        serve(observer, clock)
    fields = caplog.records[0].fields  # pyright: ignore
    assert (fields["prompts"], fields["answers"]) == (["<3 tokens>"], ["secret answer"])


def test_the_servers_own_failures_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    observer, _, _ = observer_of()
    with caplog.at_level(logging.INFO, "abyssal.serve"):
        observer.begin(ARRIVAL).end(Outcome(503, error="restarting"))
        observer.begin(ARRIVAL).end(Outcome(422, error="invalid_value"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def spans(outcome: Outcome = DONE, arrival: Arrival = ARRIVAL) -> ReadableSpan:
    exporter = InMemorySpanExporter()
    observer, clock, _ = observer_of(tracing=Tracing(exporter, at_once=True))
    serve(observer, clock, outcome, arrival)
    (span,) = exporter.get_finished_spans()
    return span


def test_a_span_has_the_conventions_names() -> None:
    span = spans()
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "abyssal.request_id": "req-1",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "abyssal",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(0.5),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 1,
    }
    assert [event.name for event in span.events] == ["queued", "prefill", "decode"]
    # The tests' clock moves without the world's: only what lies between begin and token is told by both.
    assert (span.events[2].timestamp - span.events[1].timestamp) / 1e9 == pytest.approx(0.3, abs=0.05)
    assert span.resource.attributes["service.name"] == "abyssal"


def test_the_callers_trace_goes_on() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    span = spans(arrival=replace(ARRIVAL, traceparent=parent, tracestate="vendor=1"))
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


def test_a_caller_that_samples_not_is_not_recorded() -> None:
    exporter = InMemorySpanExporter()
    observer, clock, _ = observer_of(tracing=Tracing(exporter, at_once=True))
    serve(observer, clock, arrival=replace(ARRIVAL, traceparent=f"00-{'a' * 32}-{'b' * 16}-00"))
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-0", "ff" * 400])
def test_a_broken_traceparent_begins_a_trace(header: str) -> None:
    assert spans(arrival=replace(ARRIVAL, traceparent=header)).parent is None


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (replace(DONE, error="engine_died"), StatusCode.ERROR),  # amid a stream that began with 200
        (replace(DONE, status=503, error="draining"), StatusCode.ERROR),
        (replace(DONE, status=422, error="invalid_value"), StatusCode.UNSET),  # the caller's fault
        (replace(DONE, disconnected=True), StatusCode.UNSET),
    ],
)
def test_a_span_fails_of_the_servers_own_faults(outcome: Outcome, status: StatusCode) -> None:
    span = spans(outcome)
    assert span.status.status_code is status
    assert (span.attributes or {}).get("error.type", "") == outcome.error


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "chat"),
        ("/beta/chat/completions", "chat"),
        ("/v1/completions", "text_completion"),
        ("/beta/completions", "text_completion"),
        ("/v1/responses", "chat"),
        ("/anthropic/v1/messages", "chat"),
    ],
)
def test_operations(path: str, name: str) -> None:
    assert operation(path) == name


def test_a_collectors_address() -> None:
    assert otlp_exporter("http://127.0.0.1:4318")._endpoint == "http://127.0.0.1:4318/v1/traces"  # pyright: ignore
    assert otlp_exporter("https://c.example/x/traces")._endpoint == "https://c.example/x/traces"  # pyright: ignore
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:4318' is no URL"):
        otlp_exporter("127.0.0.1:4318")
