"""Lines of the log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.serve.observe.logs import Form, JsonFormatter, TextFormatter, configure, log_handler


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("abyssal.serve.requests", logging.INFO, "f.py", 1, message, (), None)
    made.created = 1_700_000_000.25
    made.fields = fields
    return made


def test_json_has_time_level_message_and_fields() -> None:
    told = json.loads(JsonFormatter().format(record(request_id="r-1", status=200, key=None, seconds=0.25)))
    assert told == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "info",
        "logger": "abyssal.serve.requests",
        "message": "request",
        "request_id": "r-1",
        "status": 200,
        "seconds": 0.25,
    }


def test_text_has_pairs() -> None:
    line = TextFormatter().format(record(path="/v1/models", status=200, seconds=0.25, model='a "b"', key=None))
    assert line.endswith(' info    request path=/v1/models status=200 seconds=0.25 model="a \\"b\\""')


@given(st.text())
def test_nobody_writes_lines_into_the_log(text: str) -> None:
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record(model=text))
        assert len(line.splitlines()) == 1
        assert "\x1b" not in line
    assert json.loads(JsonFormatter().format(record(model=text)))["model"] == text
    assert len(TextFormatter().format(record(text)).splitlines()) == 1


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_is_told(formatter: logging.Formatter) -> None:
    made = record("failed")
    try:
        raise RuntimeError("what was wrong")
    except RuntimeError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    assert "RuntimeError: what was wrong" in formatter.format(made)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("form", "stream", "kind"),
    [
        ("auto", Terminal(), TextFormatter),
        ("auto", io.StringIO(), JsonFormatter),
        ("text", io.StringIO(), TextFormatter),
        ("json", Terminal(), JsonFormatter),
    ],
)
def test_the_form_follows_the_stream_unless_told(form: Form, stream: io.StringIO, kind: type) -> None:
    assert isinstance(log_handler(form, stream).formatter, kind)


def test_colors_are_for_terminals() -> None:
    made = record("failed")
    made.levelno, made.levelname = logging.ERROR, "ERROR"
    for stream, colored in ((Terminal(), True), (io.StringIO(), False)):
        handler = log_handler("text", stream)
        handler.emit(made)
        assert ("\x1b[31m" in stream.getvalue()) is colored


@pytest.fixture
def loggers() -> Iterator[None]:
    """As nobody has set them; as they were afterwards."""
    names = (None, "abyssal", "uvicorn", "uvicorn.access", "uvicorn.error")
    kept = [(log := logging.getLogger(name), log.handlers, log.level, log.propagate) for name in names]
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
    yield
    for log, handlers, level, propagate in kept:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_every_line_of_the_process_has_the_same_form(loggers: None) -> None:
    stream = io.StringIO()
    configure(log_handler("json", stream))
    logging.getLogger("abyssal.serve.requests").info("request", extra={"fields": {"status": 200}})
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.access").info("127.0.0.1 GET /v1/models")
    logging.getLogger("of.a.library").info("how it goes")
    logging.getLogger("of.a.library").warning("something is odd")
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in told] == ["request", "started", "something is odd"]
    assert told[0]["status"] == 200
