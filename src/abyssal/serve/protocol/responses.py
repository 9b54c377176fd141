"""``/v1/responses``: a request of OpenAI's newer API becomes one of the chat API.  Answers: :mod:`.responses_reply`.

Text and functions, without a memory: answers are not stored, so a conversation comes whole with each request, as
``input`` items.  ``store`` may be left out or false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from abyssal.serve.events import Prepared
from abyssal.serve.protocol.chat import ChatRequest, Thinking, prepare_chat
from abyssal.serve.protocol.common import Listed, Named, StreamOptions, Strict, Unsupported, read
from abyssal.serve.protocol.errors import ApiError, bad_parameter, not_supported, of_value_error
from abyssal.serve.protocol.served import ServedModel

UNSUPPORTED: Mapping[str, Unsupported] = {
    "background": Unsupported((False,), "answers are not stored, so wait for this one; leave it out"),
    "context_management": Unsupported((), "the conversation is taken as it is; leave it out"),
    "conversation": Unsupported((), "conversations are not stored; give the whole one as input"),
    "include": Unsupported(([],), "there is nothing to include; leave it out"),
    "max_tool_calls": Unsupported((), "the server calls no tools itself; leave it out"),
    "metadata": Unsupported(({},), "answers are not stored; leave it out"),
    "moderation": Unsupported((), "this server has no moderation; leave it out"),
    "previous_response_id": Unsupported((), "answers are not stored; give the whole conversation as input"),
    "prompt": Unsupported((), "there are no stored prompts; give instructions and input"),
    "prompt_cache_key": Unsupported((), "prompts are cached by their tokens and the API key; leave it out"),
    "prompt_cache_retention": Unsupported(
        ("in_memory",), "how long prompts are cached is the operator's; leave it out"
    ),
    "reasoning": Unsupported(({},), 'effort has no grades; use thinking: {"type": "enabled" | "disabled"}'),
    "service_tier": Unsupported(("auto", "default"), "there is one tier; give auto or default, or leave it out"),
    "store": Unsupported((False,), "answers are not stored; give false, or leave it out"),
    "top_logprobs": Unsupported((0,), "use /v1/chat/completions for log-probabilities"),
    "truncation": Unsupported(("disabled",), "input is not shortened; give disabled, or leave it out"),
}

_FIELDS: Mapping[str, frozenset[str]] = {
    "message": frozenset({"type", "role", "content", "id", "status"}),
    "function_call": frozenset({"type", "call_id", "name", "arguments", "id", "status"}),
    "function_call_output": frozenset({"type", "call_id", "output", "id", "status"}),
    "reasoning": frozenset({"type", "summary", "content", "id", "status"}),
}
_PARTS = ("input_text", "output_text", "text", "reasoning_text")
_PART_FIELDS = frozenset({"type", "text", "annotations", "logprobs"})
"""Of a part of text.  What an earlier answer said of its text besides is not part of the conversation."""


class TextConfig(Strict):
    """``text``."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class Function(Strict):
    """One of ``tools``."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesRequest(Named):
    """OpenAI's schema without what is in :data:`UNSUPPORTED`, and DeepSeek's ``thinking``."""

    input: str | Listed[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    parallel_tool_calls: bool = True
    safety_identifier: str = Field(default="", max_length=512)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    text: TextConfig | None = None
    thinking: Thinking | None = None
    tool_choice: Any = None
    tools: Listed[Function] | None = None
    top_p: float = Field(default=1.0, gt=0, le=1)
    user: str = Field(default="", max_length=512)


def prepare(body: object, served: ServedModel) -> Prepared:
    """A request's body, ready to run.

    Raises:
        ApiError: what is wrong, by name.
    """
    request = read(ResponsesRequest, body, UNSUPPORTED, served)
    for name in ("include_usage", "continuous_usage_stats"):
        if request.stream_options is not None and getattr(request.stream_options, name):
            raise not_supported(f"stream_options.{name}", "a stream's last event has the usage; leave it out")
    messages = _messages(request)
    try:
        prepared = prepare_chat(_chat_request(request, messages), messages, served)
    except ApiError as error:
        raise _renamed(error) from None
    except ValueError as error:
        raise _renamed(of_value_error(error)) from None
    form_name = prepared.form_name.replace("response_format", "text.format")
    return replace(prepared, form_name=form_name, repeated=_repeated(request))


def _chat_request(request: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream,
        thinking=request.thinking,
        tools=None if request.tools is None else [_tool(tool) for tool in request.tools],
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request.text),
        user=request.user or request.safety_identifier,
    )


def _tool(tool: Function) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: object) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if text.format.get("type") != "json_schema":
        return text.format
    described = {name: value for name, value in text.format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": described}


def _repeated(request: ResponsesRequest) -> dict[str, Any]:
    """What a response says of its request."""
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls,
        "temperature": request.temperature,
        "text": {"format": (request.text.format if request.text is not None else None) or {"type": "text"}},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_p": request.top_p,
    }


def _renamed(error: ApiError) -> ApiError:
    """With the names that this API's schema has."""
    message, param = error.message, error.param or ""
    for ours, theirs in ((".function", ""), ("response_format", "text.format"), ("max_tokens", "max_output_tokens")):
        message, param = message.replace(ours, theirs), param.replace(ours, theirs)
    return ApiError(error.status, message, param=param or None, code=error.code)


# ---- input


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation in the chat API's form.  What one answer is made of becomes one message again."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    answer: dict[str, Any] | None = None
    for index, item in enumerate(request.input):
        part = _message(f"input[{index}]", item)
        if part["role"] != "assistant":
            answer = None
        elif answer is not None and not (answer.get("tool_calls") and "tool_calls" not in part):
            _add(answer, part)
            continue
        else:
            answer = part
        messages.append(part)
    if not messages or (messages[-1]["role"] == "system" and not request.input):
        raise bad_parameter("input", "is empty; give a text or an item")
    return messages


def _add(answer: dict[str, Any], part: Mapping[str, Any]) -> None:
    answer["content"] += part["content"]
    for name in ("reasoning_content", "tool_calls"):
        if name in part:
            answer[name] = answer[name] + part[name] if name in answer else part[name]


def _message(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise not_supported(f"{where}.type", f"an item here is of type {', '.join(_FIELDS)}")
    for name, value in item.items():
        if value is not None and name not in fields:
            raise not_supported(f"{where}.{name[:60]}", f"an item of type {kind} holds {', '.join(sorted(fields))}")
    if kind == "reasoning":
        if item.get("summary"):
            raise not_supported(f"{where}.summary", "reasoning comes back as content; leave the summary empty")
        thought = _text(f"{where}.content", item.get("content") or [])
        return {"role": "assistant", "content": "", "reasoning_content": thought}
    if kind == "function_call":
        function = {name: _string(where, item, name) for name in ("name", "arguments")}
        call = {"id": _string(where, item, "call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _text(f"{where}.output", item.get("output"))
        return {"role": "tool", "tool_call_id": _string(where, item, "call_id"), "content": output}
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad_parameter(f"{where}.role", "must be user, assistant, system or developer")
    return {"role": role, "content": _text(f"{where}.content", item.get("content"))}


def _string(where: str, item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_parameter(f"{where}.{name}", "missing; give a text")
    return value


def _text(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise bad_parameter(where, "must be a text or a list of texts")
    return "".join(_part(f"{where}[{index}]", part) for index, part in enumerate(content))


def _part(where: str, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") not in _PARTS or not isinstance(part.get("text"), str):
        raise not_supported(where, 'a part is {"type": "input_text" | "output_text", "text": ...}; text alone')
    others = sorted(set(part) - _PART_FIELDS)
    if others:
        raise not_supported(f"{where}.{others[0][:60]}", "a part holds type and text")
    return part["text"]
