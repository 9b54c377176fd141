"""What there is to know: models, tokens, and the description of the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.http.apis import APIS
from tests.support.serving import MODEL, served
from tests.unit.serve.http.test_answers import BODIES, body
from tests.unit.serve.http.test_errors import ask, check_shape

Client = Callable[..., httpx.AsyncClient]


def get(client: httpx.AsyncClient, *paths: str) -> list[Any]:
    return [response.json() for response in ask(client, *(("GET", path, {}) for path in paths))]


def test_models(client_of: Client) -> None:
    listed, same, one, other = get(client_of(), "/v1/models", "/models", f"/v1/models/{MODEL}", f"/models/{MODEL}")
    assert listed == same == {"object": "list", "data": [one]}
    assert one == other
    assert (one["id"], one["object"], one["max_model_len"]) == (MODEL, "model", 4096)
    (missing,) = ask(client_of(), ("GET", "/v1/models/deepseek-ai/DeepSeek-V3", {}))
    assert missing.status_code == 404
    assert check_shape(missing)["code"] == "model_not_found"


def test_a_balancer_may_ask_for_the_head_alone(client_of: Client) -> None:
    for answer in ask(client_of(), ("HEAD", "/health", {}), ("HEAD", "/ready", {})):
        assert (answer.status_code, answer.content) == (200, b"")
    assert ask(client_of(), ("HEAD", "/v1/models", {}))[0].status_code == 405


def post(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return ask(client, ("POST", path, {"json": fields}))[0]


def test_a_text_in_tokens_and_back(client_of: Client) -> None:
    tokenizer = served().tokenizer
    text = "the tools é and 深"
    found = post(client_of(), "/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == tokenizer.encode(text, add_bos=True)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
    assert len(found["token_strs"]) == found["count"]
    plain = post(client_of(), "/tokenize", prompt=text, model=MODEL, add_special_tokens=False).json()
    assert plain["tokens"] == tokenizer.encode(text) and plain["token_strs"] is None
    assert post(client_of(), "/detokenize", tokens=plain["tokens"]).json() == {"prompt": text}


def test_a_conversation_in_tokens(client_of: Client) -> None:
    messages = [{"role": "user", "content": "the tools"}]
    found = post(client_of(), "/tokenize", messages=messages).json()
    answer = post(client_of(), "/v1/chat/completions", model=MODEL, messages=messages).json()
    assert found["count"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/tokenize", {}, 422),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 422),
        ("/tokenize", {"prompt": "a", "tools": []}, 422),
        ("/tokenize", {"prompt": "a", "model": "gpt-4o"}, 404),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 422),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, 422),
        ("/detokenize", {}, 422),
        ("/detokenize", {"tokens": [1 << 40]}, 422),
        ("/detokenize", {"tokens": [-1]}, 422),
        ("/detokenize", {"tokens": [1], "model": {}}, 422),
        ("/detokenize", {"tokens": [1] * (8 * 4096 + 1)}, 422),
        ("/tokenize", {"prompt": "a" * (1 << 22)}, 422),
    ],
)
def test_what_cannot_be_tokenized(client_of: Client, path: str, fields: dict[str, Any], status: int) -> None:
    response = post(client_of(), path, **fields)
    assert response.status_code == status
    check_shape(response)


def described(client: httpx.AsyncClient) -> dict[str, Any]:
    return get(client, "/openapi.json")[0]


def schema_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of a path's body, with what it refers to."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**schema, "components": document["components"]}


def test_every_path_is_described_and_every_description_is_of_a_path(client_of: Client) -> None:
    document = described(client_of())
    expected = {path for api in APIS for path in api.paths} | {"/tokenize", "/detokenize", "/health", "/ready"}
    assert expected | {"/v1/models", "/models/{name}", "/user/balance"} <= set(document["paths"])
    for path, item in document["paths"].items():
        for method in item:
            (response,) = ask(client_of(), (method.upper(), path.replace("{name}", MODEL), {"json": {}}))
            assert response.status_code not in (404, 405, 500), (path, method)
            assert str(response.status_code) in item[method]["responses"], (path, response.status_code)
    names = [item[method]["operationId"] for item in document["paths"].values() for method in item]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_are_read_meet_their_schema_and_others_do_not(client_of: Client, path: str) -> None:
    schema = schema_of(described(client_of()), path)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    good = body(path, stream=None, temperature=0.5)
    bad = [{**good, "model": "gpt-4o"}, {**good, "tempature": 1}, {**good, "temperature": "hot"}, {"model": MODEL}]
    assert validator.is_valid(good)
    assert ask(client_of(), ("POST", path, {"json": good}))[0].status_code == 200
    for each in bad:
        assert not validator.is_valid(each)
        assert ask(client_of(), ("POST", path, {"json": each}))[0].status_code in (404, 422)


def test_parameters_that_are_not_supported_say_so(client_of: Client) -> None:
    schemas = described(client_of())["components"]["schemas"]
    store = schemas["ChatRequest"]["properties"]["store"]
    assert store["enum"] == [False, None] and "not stored" in store["description"]
    assert json.dumps(schemas).count(":data:") == 0, "no mark-up of ours"


def test_keys_are_described_where_there_are_some(client_of: Client, desk: Desk) -> None:
    opened, keyed = described(client_of()), described(client_of(desk=desk))
    assert "security" not in opened["paths"]["/v1/completions"]["post"]
    assert keyed["paths"]["/v1/completions"]["post"]["security"] == [{"bearer": []}, {"key": []}]
    assert "401" in keyed["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in keyed["paths"]["/health"]["get"]
