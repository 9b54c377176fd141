"""JSON schemas of what pydantic does not read: messages and tools (the text package does), answers, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abyssal.text.tools import MOST_NAME

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "integer", "minimum": 0}


def _object(required: str = "", closed: bool = True, **properties: Any) -> Schema:
    made: Schema = {"type": "object", "properties": properties, "required": required.split()}
    return {**made, "additionalProperties": False} if closed else made


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


_PART = _object("type text", type={"const": "text"}, text=_TEXT)
_CONTENT: Schema = {"anyOf": [_TEXT, _list(_PART)]}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]+$", "minLength": 1, "maxLength": MOST_NAME}
_PARAMETERS: Schema = {"type": "object", "description": "A JSON schema of an object."}
_FUNCTION = _object(
    "name",
    closed=False,
    name=_NAME,
    parameters=_or_null(_PARAMETERS),
    strict=_or_null({"type": "boolean"}),
)
_TOOLS = _list(_object("function", closed=False, type={"const": "function"}, function=_FUNCTION))
_CALL = _object(
    "function",
    closed=False,
    id=_or_null(_TEXT),
    type={"enum": ["function", None]},
    function=_object("name arguments", closed=False, name=_TEXT, arguments={"type": ["string", "object"]}),
)
_MESSAGE: Schema = {
    "anyOf": [
        _object("role content", role={"enum": ["system", "developer", "user"]}, content=_CONTENT),
        _object(
            "role",
            role={"const": "assistant"},
            content=_or_null(_CONTENT),
            reasoning_content=_or_null(_TEXT),
            tool_calls=_or_null(_list(_CALL)),
            prefix=_or_null({"type": "boolean"}),
        ),
        _object("role content tool_call_id", role={"const": "tool"}, content=_CONTENT, tool_call_id=_TEXT, name=_TEXT),
    ]
}
_PROMPT: Schema = {"anyOf": [_TEXT, _list(_TEXT, 1), _list(_NUMBER, 1), _list(_list(_NUMBER, 1), 1)]}
_FORM: Schema = {
    "anyOf": [
        _object("type", type={"enum": ["text", "json_object"]}),
        _object(
            "type json_schema",
            type={"const": "json_schema"},
            json_schema=_object("name", closed=False, name=_TEXT, schema={"type": "object"}),
        ),
    ]
}
_CHOICE: Schema = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _object("type function", type={"const": "function"}, function=_object("name", name=_TEXT)),
    ]
}

FIELDS: Mapping[str, Mapping[str, Schema]] = {
    "ChatRequest": {
        "messages": _list(_MESSAGE, 1),
        "tools": _or_null(_TOOLS),
        "tool_choice": _or_null(_CHOICE),
        "response_format": _or_null(_FORM),
    },
    "StreamOptions": {"include_obfuscation": {"enum": [False, None]}},
    "CompletionRequest": {"prompt": _PROMPT},
    "TokenizeRequest": {"messages": _or_null(_list(_MESSAGE, 1)), "tools": _or_null(_TOOLS)},
    "DetokenizeRequest": {"tokens": _list(_NUMBER)},
}
"""By schema and parameter."""

_USAGE = _object(
    "prompt_tokens completion_tokens total_tokens",
    closed=False,
    prompt_tokens=_NUMBER,
    completion_tokens=_NUMBER,
    total_tokens=_NUMBER,
)
_HEAD: Schema = {"id": _TEXT, "created": _NUMBER, "model": _TEXT}
_INFO = _object(
    "currency total_balance granted_balance topped_up_balance",
    currency=_TEXT,
    total_balance=_TEXT,
    granted_balance=_TEXT,
    topped_up_balance=_TEXT,
)
_MODEL = _object(
    "id object created owned_by",
    id=_TEXT,
    object={"const": "model"},
    created=_NUMBER,
    owned_by=_TEXT,
    max_model_len=_NUMBER,
)

RESPONSES: Mapping[str, Schema] = {
    "ChatCompletion": _object(
        "id object created model choices usage",
        closed=False,
        **_HEAD,
        object={"const": "chat.completion"},
        choices=_list({"type": "object"}, 1),
        usage=_USAGE,
    ),
    "Completion": _object(
        "id object created model choices usage",
        closed=False,
        **_HEAD,
        object={"const": "text_completion"},
        choices=_list({"type": "object"}, 1),
        usage=_USAGE,
    ),
    "ResponsesAnswer": _object(
        "id object status output",
        closed=False,
        id=_TEXT,
        object={"const": "response"},
        status=_TEXT,
        output=_list({"type": "object"}),
    ),
    "MessagesAnswer": _object(
        "id type role content",
        closed=False,
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        content=_list({"type": "object"}),
    ),
    "Model": _MODEL,
    "Models": _object("object data", object={"const": "list"}, data=_list(_MODEL)),
    "Balance": _object("is_available balance_infos", is_available={"type": "boolean"}, balance_infos=_list(_INFO)),
    "Status": _object("status", status=_TEXT),
    "Tokens": _object(
        "count max_model_len tokens",
        count=_NUMBER,
        max_model_len=_NUMBER,
        tokens=_list(_NUMBER),
        token_strs=_or_null(_list(_TEXT)),
    ),
    "Text": _object("prompt", prompt=_TEXT),
}

EVENT = _object("data", closed=False, event=_TEXT, data=_TEXT)
"""One of a stream; its data is JSON, or ``[DONE]``."""

ERRORS: Mapping[str, Schema] = {
    "Error": _object(
        "error",
        error=_object(
            "message type param code", message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT)
        ),
    ),
    "AnthropicError": _object(
        "type error", type={"const": "error"}, error=_object("type message", type=_TEXT, message=_TEXT)
    ),
}
