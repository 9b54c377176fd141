"""Bad input: the right status, in the API's own shape, whatever is wrong with it."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from abyssal.serve.http.body import parse
from abyssal.serve.protocol.errors import ApiError, of_value_error
from abyssal.serve.service import State
from tests.support.scripted_service import ScriptedService
from tests.support.serving import MODEL

Client = Callable[..., httpx.AsyncClient]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "the"}]}
RAW = json.dumps(BODY).encode()


def ask(client: httpx.AsyncClient, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(run())


def check_shape(response: httpx.Response, path: str = CHAT) -> dict[str, Any]:
    """OpenAI's, or Anthropic's under its path; the error itself."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    if path.startswith("/anthropic/"):
        assert set(body) == {"type", "error"} and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
        assert response.headers["request-id"] == response.headers["x-request-id"]
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


BODIES = {
    "empty": (b"", 400, "invalid_json"),
    "no JSON": (b'{"model": ', 400, "invalid_json"),
    "no object": (b"[]", 400, "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "invalid_json"),
    "UTF-16": (json.dumps(BODY).encode("utf-16"), 400, "invalid_json"),
    "NaN": (b'{"temperature": NaN}', 400, "invalid_json"),
    "infinite": (b'{"temperature": -Infinity}', 400, "invalid_json"),
    "too large a number": (b'{"temperature": 1e999}', 400, "invalid_json"),
    "too long a number": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    "a name twice": (b'{"model": "a", "model": "b"}', 400, "invalid_json"),
    "a name twice, deep inside": (b'{"a": [{"b": 1, "b": 2}]}', 400, "invalid_json"),
    "deep": (nested(200), 400, "invalid_json"),
    "very deep": (nested(200_000), 400, "invalid_json"),
    "half a surrogate": (RAW.replace(b"the", b"\\ud800"), 422, "invalid_value"),
    "another model": (RAW.replace(MODEL.encode(), b"gpt-4o"), 404, "model_not_found"),
    "no model": (b'{"messages": []}', 422, "missing_required_parameter"),
    "unknown parameter": (json.dumps({**BODY, "tempature": 1}).encode(), 422, "unknown_parameter"),
    "unknown parameter that is null": (json.dumps({**BODY, "tempature": None}).encode(), 422, "unknown_parameter"),
    "not supported": (json.dumps({**BODY, "store": True}).encode(), 422, "unsupported_parameter"),
    "out of range": (json.dumps({**BODY, "temperature": 3}).encode(), 422, "invalid_value"),
    "another type": (json.dumps({**BODY, "stream": "yes"}).encode(), 422, "invalid_value"),
    "too long": (RAW.replace(b"the", b"qz" * 3000), 400, "context_length_exceeded"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body(client_of: Client, name: str) -> None:
    content, status, code = BODIES[name]
    (response,) = ask(client_of(), ("POST", CHAT, {"content": content, "headers": JSON}))
    assert response.status_code == status, response.text
    assert check_shape(response)["code"] == code


def test_an_image_and_a_strange_call_are_refused_by_name(client_of: Client) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    calls = [{"role": "assistant", "tool_calls": [{**call, **strange}]} for strange in ({"id": {}}, {"type": "custom"})]
    bodies = [{**BODY, "messages": [message]} for message in (image, *calls)]
    responses = ask(client_of(), *(("POST", CHAT, {"json": body}) for body in bodies))
    assert [response.status_code for response in responses] == [422, 422, 422]
    params = [check_shape(response)["param"] for response in responses]
    assert params == ["messages[0].content[0]", "messages[0].tool_calls[0].id", "messages[0].tool_calls[0].type"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/json; charset=latin-1"},
        {**JSON, "content-encoding": "gzip"},
    ],
)
def test_a_body_that_is_no_json_by_its_header(client_of: Client, headers: dict[str, str]) -> None:
    content = gzip.compress(RAW) if "content-encoding" in headers else RAW
    (response,) = ask(client_of(), ("POST", CHAT, {"content": content, "headers": headers}))
    assert response.status_code == 415
    assert check_shape(response)["code"] == "unsupported_media_type"


def test_headers_in_odd_cases_are_read(client_of: Client) -> None:
    headers = {"CoNtEnT-tYpE": 'Application/JSON; Charset="UTF-8"'}
    (response,) = ask(client_of(), ("POST", CHAT, {"content": RAW, "headers": headers}))
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/", "/v2/chat/completions", "/anthropic/v1/complete", "/é%00"])
def test_there_is_nothing_there(client_of: Client, path: str) -> None:
    (response,) = ask(client_of(), ("GET", path, {}))
    assert response.status_code == 404
    check_shape(response, path)


@pytest.mark.parametrize("path", [CHAT, "/anthropic/v1/messages", "/tokenize", "/v1/models", "/ready"])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_a_method_that_a_path_has_not(client_of: Client, path: str, method: str) -> None:
    (response,) = ask(client_of(), (method, path, {}))
    assert response.status_code == 405
    assert response.headers["allow"] == ("GET" if path in ("/v1/models", "/ready") else "POST")
    check_shape(response, path)


def test_too_large_a_body(client_of: Client) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 10

    given = [
        {"content": b" " * 101},
        {"content": pieces()},
        {"content": b" " * 101, "headers": {"expect": "100-continue"}},
    ]
    for options in given:
        options = {**options, "headers": {**JSON, **options.get("headers", {})}}
        (response,) = ask(client_of(body_bytes=100), ("POST", "/anthropic/v1/messages", options))
        assert response.status_code == 413
        assert check_shape(response, "/anthropic/")["type"] == "request_too_large"


def test_large_bodies_take_bounded_memory_and_crowd_out_no_small_ones(client_of: Client) -> None:
    large = {"content": RAW + b" " * 300_000, "headers": JSON}
    small = {"content": RAW, "headers": JSON}
    refused, good = ask(client_of(bodies_bytes=200_000), ("POST", CHAT, large), ("POST", CHAT, small))
    assert (refused.status_code, good.status_code) == (503, 200)
    assert check_shape(refused)["code"] == "server_overloaded"
    assert refused.headers["retry-after"] == "1"
    assert ask(client_of(bodies_bytes=400_000), *[("POST", CHAT, large)] * 3)[2].status_code == 200, "it is given back"


@pytest.mark.parametrize("state", [State.STARTING, State.RESTARTING, State.FAILED])
def test_a_model_that_does_not_run(client_of: Client, service: ScriptedService, state: State) -> None:
    service.state = state
    requests = ("POST", CHAT, {"json": BODY}), ("GET", "/ready", {}), ("GET", "/health", {}), ("GET", "/v1/models", {})
    answer, ready, health, models = ask(client_of(), *requests)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    check_shape(answer)
    assert (ready.status_code, ready.json()) == (503, {"status": state.value})
    assert (health.status_code, models.status_code) == (200, 200)


def test_a_mistake_of_ours_says_nothing_of_the_request(
    client_of: Client, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(prepared: Any) -> Any:
        raise RuntimeError(f"unexpected: {prepared.prompts}")

    service.script = broken
    streamed = {**BODY, "stream": True}
    for response in ask(client_of(), ("POST", CHAT, {"json": BODY}), ("POST", CHAT, {"json": streamed})):
        assert response.status_code == 500
        assert check_shape(response)["type"] == "server_error"
        assert response.headers["x-request-id"] in caplog.text
    assert "RuntimeError" in caplog.text and "in broken" in caplog.text
    assert "unexpected: (" not in caplog.text


def test_another_name_of_the_server_is_refused_where_names_are_given(client_of: Client) -> None:
    for host, status in (("localhost", 200), ("LocalHost:8000", 200), ("evil.example", 421), ("", 421)):
        (response,) = ask(client_of(hosts=("localhost",)), ("POST", CHAT, {"json": BODY, "headers": {"host": host}}))
        assert response.status_code == status
        if status != 200:
            check_shape(response)


def test_a_full_server(client_of: Client) -> None:
    async def run() -> list[httpx.Response]:
        async with client_of(most_requests=1) as client:
            return await asyncio.gather(*(client.post(CHAT, json=BODY) for _ in range(2)))

    done, refused = sorted(asyncio.run(run()), key=lambda response: response.status_code)
    assert (done.status_code, refused.status_code) == (200, 503)
    assert check_shape(refused)["code"] == "server_overloaded"


def test_a_client_s_own_id_is_told_back(client_of: Client) -> None:
    good, bad = (
        ask(client_of(), ("GET", "/health", {"headers": {"X-Request-ID": theirs}}))[0] for theirs in ("my-1", "a b\t")
    )
    assert good.headers["x-client-request-id"] == "my-1"
    assert "x-client-request-id" not in bad.headers
    assert good.headers["x-request-id"] != "my-1"


def test_no_other_server_s_page_may_ask_unless_allowed(client_of: Client) -> None:
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    closed, opened = (
        ask(
            client_of(**options),
            ("OPTIONS", CHAT, {"headers": asked}),
            ("POST", CHAT, {"json": BODY, "headers": asked}),
        )
        for options in ({}, {"cors_origins": ("https://chat.example",)})
    )
    assert all("access-control-allow-origin" not in response.headers for response in closed)
    assert [response.status_code for response in opened] == [200, 200]
    (another,) = ask(
        client_of(cors_origins=("https://chat.example",)),
        ("OPTIONS", CHAT, {"headers": {**asked, "origin": "https://evil.example"}}),
    )
    assert another.status_code == 400 and "access-control-allow-origin" not in another.headers
    assert check_shape(another)["code"] == "origin_not_allowed"
    assert all(response.headers["access-control-allow-origin"] == "https://chat.example" for response in opened)


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
        ("/v1/responses", {"input": "the", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ("/v1/responses", {"input": "the", "tools": [{"type": "function", "name": "f", "strict": True}]}, "tools"),
        ("/anthropic/v1/messages", {"max_tokens": 9, "tools": [{"name": "f", "input_schema": {}, "strict": True}]}, ""),
    ],
)
def test_a_form_that_the_engine_refuses_has_its_parameters_name(
    client_of: Client, service: ScriptedService, path: str, fields: dict[str, Any], name: str
) -> None:
    """The engine knows nothing of the API's parameters."""
    service.script = lambda _: [of_value_error(ValueError("structured: the form cannot be used"))]
    body = {**BODY, **fields} if "input" not in fields else {"model": MODEL, **fields}
    error = check_shape(ask(client_of(), ("POST", path, {"json": body}))[0], path)
    assert error["message"] == f"{name or 'tools'}: the form cannot be used" and error.get("param", "") == name


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("foo", "foo"),
        ("max-tokens", "'max-tokens'"),
        ("str", "str"),
        ("", "''"),
        ("\0", "'\\x00'"),
        ("k" * 9999, "k" * 80),
    ],
)
def test_an_unknown_parameter_is_named_whatever_its_name(client_of: Client, given: str, named: str) -> None:
    outer, inner = ask(
        client_of(),
        ("POST", CHAT, {"json": {**BODY, given: 1}}),
        ("POST", CHAT, {"json": {**BODY, "stream": True, "stream_options": {given: 1}}}),
    )
    for response, name in ((outer, named), (inner, f"stream_options.{named}")):
        error = check_shape(response)
        assert (response.status_code, error["code"], error["param"]) == (422, "unknown_parameter", name)
        assert error["message"] == f"{name}: unknown parameter; remove it"


@pytest.mark.parametrize("end", ["]}", "]"])
def test_a_body_of_many_values_is_read_without_looking_for_garbage(end: str) -> None:
    """Which would stop everybody, again and again."""
    looked: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        looked.append(phase)

    raw = ('{"a": [' + "[]," * 300_000 + "0" + end).encode()
    gc.callbacks.append(note)
    try:
        with suppress(ApiError):
            parse(raw)
        during = len(looked)
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled() and during < 10
