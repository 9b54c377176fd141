"""Requests made up from the server's own description of itself, and what has to be true of every answer.

schemathesis makes bodies that meet a path's schema, and bodies that do not.  Few of the first get far, since a made-up
conversation is seldom one; so each is sent again with a conversation that is, and again with each of its fields alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

LEFT_OUT = ("positive_data_acceptance", "unsupported_method")
"""Not every conversation that meets the schema is one; and other methods have tests of their own."""
SUPPRESSED: Any = list(HealthCheck)
ALIKE = ("/chat/completions", "/completions", "/responses", "/models", "/models/{name}", "/beta/v1/")
"""Paths, or how they begin, that are others' second names."""

Send = Callable[[str, object], tuple[int, bytes]]
"""A body to a path: the answer's status and body."""


@dataclass
class Fuzz:
    """A run over all paths.

    Args:
        schema: schemathesis' view of ``/openapi.json``.
        send: for the requests that are made of others.
        small: added to each body that lets a model write, so that it soon ends.
    """

    schema: Any
    send: Send
    model: str
    small: Mapping[str, Any] = field(default_factory=dict)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return self.statuses.total()

    def run(self, examples: int, random: bool = False) -> None:
        """So many of each kind for each path.

        Raises:
            AssertionError: an answer is not as it has to be; the request is told.
        """
        for found in self.schema.get_all_operations():
            operation = found.ok()
            if not operation.path.startswith(ALIKE):
                for mode in GenerationMode:
                    self._run(operation, mode, examples, random)

    def _run(self, operation: Any, mode: GenerationMode, examples: int, random: bool) -> None:
        @settings(
            max_examples=examples,
            derandomize=not random,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=SUPPRESSED,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            self._check(case, mode)

        try:
            check()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, f"{operation.label}: there is no request"

    def _check(self, case: Any, mode: GenerationMode) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = {**case.body, **self._limits(case.path)}
        response = case.call()
        self._verify(case.path, case.body, response.status_code, response.content)
        case.validate_response(response, excluded_checks=CHECKS.get_by_names(list(LEFT_OUT)))
        if case.path in VALID and isinstance(case.body, dict):
            for body in self._made_of(case.path, case.body):
                self._verify(case.path, body, *self.send(case.path, body))

    def _limits(self, path: str) -> Mapping[str, Any]:
        if path == "/v1/responses":
            return {"max_output_tokens": next(iter(self.small.values()))} if self.small else {}
        return self.small if path in VALID else {}

    def _made_of(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A valid body with all of the fields, and one with each, plain and streamed."""
        valid = {**VALID[path], "model": self.model, **self._limits(path)}
        for stream in (False, True):
            yield {**body, **valid, "stream": stream}
            for name, value in body.items():
                if name not in valid:
                    yield {**valid, "stream": stream, name: value}

    def _verify(self, path: str, body: object, status: int, content: bytes) -> None:
        self.statuses[path, status] += 1
        told = f"POST {path} {json.dumps(body, default=repr)[:2000]}: {status} {content[:500]!r}"
        assert status < 500, told
        if status >= 400:
            assert is_error(path, content), told


_SAY = [{"role": "user", "content": "the tools"}]
VALID: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": _SAY},
    "/beta/chat/completions": {"messages": _SAY},
    "/v1/completions": {"prompt": "the tools"},
    "/beta/completions": {"prompt": "the tools"},
    "/v1/responses": {"input": "the tools"},
    "/anthropic/v1/messages": {"messages": _SAY, "max_tokens": 4},
}
"""What else a body needs beside its model."""


def is_error(path: str, content: bytes) -> bool:
    """Whether a body is an error in the shape of the path's API."""
    body = json.loads(content)
    if path.startswith("/anthropic"):
        error = body.get("error", {})
        return body.keys() == {"type", "error"} and body["type"] == "error" and _texts(error, ("type", "message"))
    error = body.get("error", {})
    known = {"message", "type", "param", "code"}
    return body.keys() == {"error"} and error.keys() == known and _texts(error, ("message", "type"))


def _texts(error: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(isinstance(error.get(name), str) and error[name] for name in names)
