"""Spans on their way to an OpenTelemetry collector, here a small HTTP server."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from abyssal.serve.observe.figures import Figures
from abyssal.serve.observe.tracing import Tracing, otlp_exporter
from abyssal.serve.observe.watch import RequestObserver
from abyssal.serve.observer import Arrival, Outcome


class _Collector(BaseHTTPRequestHandler):
    received: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the tests' output."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """Its address, and what it got."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Collector", (_Collector,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_left_is_sent_when_the_server_ends(
    collector: tuple[str, list[tuple[str, ExportTraceServiceRequest]]],
) -> None:
    address, received = collector
    tracing = Tracing(otlp_exporter(address))
    observer = RequestObserver(Figures(), tracing)
    for number in range(3):
        observer.begin(Arrival(f"req-{number}", "/v1/completions", observer.ticks())).end(Outcome(200))
    tracing.close()
    assert {path for path, _ in received} == {"/v1/traces"}
    spans = [
        span
        for _, request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == ["POST /v1/completions"] * 3
    ids = {item.value.string_value for span in spans for item in span.attributes if item.key == "abyssal.request_id"}
    assert ids == {"req-0", "req-1", "req-2"}
