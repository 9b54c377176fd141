"""The server's log: a line a record, as JSON for machines or as text for terminals.

A record's fields come in ``extra={"fields": {...}}``.  Whatever a caller can influence is escaped, so that nobody
writes lines into the log.  No field holds a prompt, an answer or a key's secret unless the operator asked for texts.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Form = Literal["auto", "json", "text"]
LOGGER = "abyssal.serve"
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./:@+*,")
_COLORS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            body["error"] = _trace(record)
        return json.dumps(body, ensure_ascii=False, default=str).translate(_SEPARATORS)


class TextFormatter(logging.Formatter):
    """The time of day, the message and ``name=value`` pairs.

    Args:
        colors: whether the terminal shows them.
    """

    def __init__(self, colors: bool = False) -> None:
        super().__init__()
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        pairs = "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())
        line = f"{moment} {record.levelname.lower():<8}{_escaped(record.getMessage())}{pairs}"
        color = _COLORS.get(record.levelno) if self._colors else None
        if color is not None:
            line = f"{color}{line}\x1b[0m"
        return f"{line}\n{_trace(record)}" if record.exc_info else line


_SEPARATORS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Line ends that JSON allows in a string and that readers of lines may take for one."""


def log_handler(form: Form = "auto", stream: TextIO | None = None) -> logging.Handler:
    """A handler that writes to ``stream`` (standard error by default).

    Args:
        form: ``auto``: text on a terminal, JSON elsewhere.
    """
    target = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(target)
    terminal = target.isatty()
    text = form == "text" or (form == "auto" and terminal)
    handler.setFormatter(TextFormatter(colors=terminal) if text else JsonFormatter())
    return handler


def configure(handler: logging.Handler, level: int = logging.INFO) -> None:
    """Send the process's records to ``handler`` alone: abyssal's and uvicorn's from ``level`` on, warnings of other
    libraries.  For the command line, as loggers belong to the process.  uvicorn's own line a request is left out, since
    ours says more."""
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name, least in (("abyssal", level), ("uvicorn", level), ("uvicorn.access", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.setLevel(least)
        logger.propagate = True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}


def _shown(value: Any) -> str:
    """Short where it is plain, else as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if isinstance(value, int | str) and text and _PLAIN.issuperset(text):
        return text
    return json.dumps(value, default=str)


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _trace(record: logging.LogRecord) -> str:
    assert record.exc_info
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()
