"""``/openapi.json``: every endpoint, its body by the schema that reads it, and its errors.

Bodies are read by hand (:mod:`.body`), so FastAPI knows nothing of them; what it knows, the routes of mounted routers,
is taken over.  A parameter that may be ``null`` is absent then; one that this server does not have may have the values
that ask for nothing, and its description says what to do instead of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from abyssal.serve.http.apis import APIS, Api
from abyssal.serve.http.front import Front
from abyssal.serve.http.schemas import ERRORS, EVENT, FIELDS, NULL, RESPONSES
from abyssal.serve.http.tokens import TOKENIZE_UNSUPPORTED, DetokenizeRequest, TokenizeRequest
from abyssal.serve.protocol.common import Named, Unsupported

_REFERENCE = "#/components/schemas/{model}"
_KEY_ERRORS = {401: "no key, or an unknown one"}
_WORK_ERRORS = {
    400: "the body is no JSON object, or the prompt is longer than the model's context",
    402: "the balance is spent",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON by its header",
    422: "a parameter is unknown, not supported, or has a value that cannot be",
    429: "too many requests; see Retry-After",
    500: "the server's own fault",
    503: "the server is starting, draining or overloaded; see Retry-After",
}


def describe(app: FastAPI, front: Front) -> None:
    """Add the path to the application, whose other routes are there already."""
    held: list[dict[str, Any]] = []

    async def openapi(request: Request) -> Response:
        if not held:
            held.append(document(app, front))
        return JSONResponse(held[0])

    app.add_route("/openapi.json", openapi, ["GET"], include_in_schema=False)


def document(app: FastAPI, front: Front) -> dict[str, Any]:
    """The whole of it."""
    about = "OpenAI's, DeepSeek's and Anthropic's APIs over one model."
    made = get_openapi(title="abyssal", version=version("abyssal"), description=about, routes=app.routes)
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {**ERRORS, **RESPONSES}
    for path, item in made.get("paths", {}).items():
        paths[path] = {method: _of_router(operation) for method, operation in item.items()}
    for api in APIS:
        for path in api.paths:
            paths[path] = {"post": _answer(front, api, path, schemas)}
    texts = (
        ("/tokenize", "What a prompt is in tokens", TokenizeRequest, TOKENIZE_UNSUPPORTED, "Tokens"),
        ("/detokenize", "What tokens are as text", DetokenizeRequest, {}, "Text"),
    )
    for path, summary, request, unsupported, response in texts:
        body = _request(front, request, unsupported, schemas)
        paths[path] = {"post": _operation(front, path, summary, _WORK_ERRORS, response, body)}
    paths.update(_lookups(front))
    components: dict[str, Any] = {"schemas": schemas}
    if front.desk is not None:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return {**made, "paths": paths, "components": components}


def _of_router(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Of a mounted router: its errors have the shape of all others."""
    good = {status: response for status, response in operation["responses"].items() if status[0] in "123"}
    return {**operation, "responses": {**good, "4XX": _error("refused"), "503": _error("not now")}}


def _answer(front: Front, api: Api, path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    body = _request(front, api.request, api.unsupported, schemas)
    error = "AnthropicError" if api.dialect.name == "anthropic" else "Error"
    response = {"anthropic": "MessagesAnswer", "responses": "ResponsesAnswer"}.get(api.dialect.name, _whole(api))
    return _operation(front, path, api.summary, _WORK_ERRORS, response, body, error, stream=True)


def _whole(api: Api) -> str:
    return "ChatCompletion" if api.prefix == "chatcmpl-" else "Completion"


def _lookups(front: Front) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    for prefix in ("/v1", ""):
        path = f"{prefix}/models"
        paths[path] = {"get": _operation(front, path, "The model", {}, "Models")}
        one = _operation(front, f"{path}/name", "The model, by its name", {404: "no such model"}, "Model")
        paths[f"{path}/{{name}}"] = {"get": {**one, "parameters": [name]}}
    balance = "What is left to pay with (DeepSeek's API)"
    paths["/user/balance"] = {"get": _operation(front, "/user/balance", balance, {}, "Balance")}
    for path, summary in (("/health", "Whether the server lives"), ("/ready", "Whether the model can be asked")):
        operation = _operation(None, path, summary, {}, "Status")
        if path == "/ready":
            operation["responses"]["503"] = _described("not now", "Status")
        paths[path] = {"get": operation}
    return paths


def _operation(
    front: Front | None,
    path: str,
    summary: str,
    errors: Mapping[int, str],
    response: str,
    body: Mapping[str, Any] | None = None,
    error: str = "Error",
    stream: bool = False,
) -> dict[str, Any]:
    """Args: front: None where no key is asked for."""
    answer = _described("the answer", response)
    if stream:
        answer["content"]["text/event-stream"] = {"schema": EVENT}
    keyed = front is not None and front.desk is not None
    told = {**errors, **(_KEY_ERRORS if keyed else {})}
    if front is not None and front.settings.hosts:
        told[421] = "the server was called by a name that it does not have"
    made: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace(".", "_"),
        "summary": summary,
        "responses": {"200": answer, **{str(status): _error(text, error) for status, text in sorted(told.items())}},
    }
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if keyed:
        made["security"] = [{"bearer": []}, {"key": []}]
    return made


def _described(text: str, schema: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _reference(schema)}}}


def _error(text: str, schema: str = "Error") -> dict[str, Any]:
    return _described(text, schema)


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}


def _request(
    front: Front, request: type[Named], unsupported: Mapping[str, Unsupported], schemas: dict[str, Any]
) -> dict[str, str]:
    """A reference to the request's schema, which is put among ``schemas`` with those that it refers to."""
    made = request.model_json_schema(ref_template=_REFERENCE)
    for name, schema in made.pop("$defs", {}).items():
        schemas[name] = _nullable({**schema, "properties": _known(name, schema)})
    properties = _known(request.__name__, made)
    if not front.routes.providers:  # else there are others
        properties["model"] = {"type": "string", "enum": [front.settings.model]}
    properties |= {name: _harmless(parameter) for name, parameter in unsupported.items()}
    schemas[request.__name__] = _nullable({**made, "properties": properties})
    return _reference(request.__name__)


def _known(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of the schema, by hand where pydantic knows less."""
    known = FIELDS.get(name, {})
    return {name: known.get(name, field) for name, field in schema.get("properties", {}).items()}


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With ``null`` for whatever may be absent."""
    required: Sequence[str] = schema.get("required", ())
    properties = {
        name: field if name in required or _takes_null(field) else _or_null(field)
        for name, field in schema.get("properties", {}).items()
    }
    about_ours = ("description", "title")  # what pydantic takes from the class is for its readers
    return {**{name: value for name, value in schema.items() if name not in about_ours}, "properties": properties}


def _takes_null(field: Mapping[str, Any]) -> bool:
    return field == NULL or NULL in field.get("anyOf", ()) or None in field.get("enum", ())


def _or_null(field: Mapping[str, Any]) -> dict[str, Any]:
    about = {name: field[name] for name in ("title", "description", "default") if name in field}
    return {**about, "anyOf": [{name: value for name, value in field.items() if name not in about}, NULL]}


def _harmless(parameter: Unsupported) -> dict[str, Any]:
    described = {"description": f"Not supported; {parameter.hint}."}
    return {**described, **({"enum": [*parameter.harmless, None]} if parameter.harmless else NULL)}
