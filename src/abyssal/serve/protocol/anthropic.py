"""``/anthropic/v1/messages``: a request of Anthropic's becomes one of the chat API.  Answers: :mod:`.anthropic_reply`.

====================================  ==========================================================================
Anthropic's                           here
====================================  ==========================================================================
``system``                            the first message, of role system
``tool_use``, ``tool_result``         calls, and messages of role tool; an ``is_error`` begins with ``Error:``
``thinking`` blocks                   ``reasoning_content``; signatures are not looked at
an assistant's message at the end     its beginning, from which the model goes on
``stop_sequences``                    ``stop``
``cache_control``                     every prompt is cached in any case, so there is nothing left to do
``thinking.budget_tokens``            refused: reasoning has no limit of its own
====================================  ==========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from abyssal.serve.events import Prepared
from abyssal.serve.protocol.chat import ChatRequest, Thinking, prepare_chat
from abyssal.serve.protocol.common import INT64, Listed, Named, Strict, Unsupported, read
from abyssal.serve.protocol.errors import ApiError, bad_parameter, not_supported, of_value_error
from abyssal.serve.protocol.served import ServedModel

UNSUPPORTED: Mapping[str, Unsupported] = {
    "container": Unsupported((), "this server runs no code; leave it out"),
    "context_management": Unsupported((), "the conversation is taken as it is; leave it out"),
    "inference_geo": Unsupported((), "there is one place; leave it out"),
    "mcp_servers": Unsupported((), "this server calls no others; leave it out"),
    "output_config": Unsupported((), "answers have no configured form here; leave it out"),
    "service_tier": Unsupported(("auto", "standard_only"), "there is one tier; leave it out"),
}

_BLOCKS: Mapping[str, tuple[str, Mapping[str, type | tuple[type, ...]]]] = {
    "text": ("", {"text": str}),
    "thinking": ("assistant", {"thinking": str, "signature": str}),
    "tool_use": ("assistant", {"id": str, "name": str, "input": dict}),
    "tool_result": ("user", {"tool_use_id": str, "content": (str, list), "is_error": bool}),
}
"""By type: the role whose messages hold such blocks (empty: any), and their fields."""
_OPTIONAL = frozenset({"content", "is_error", "signature"})


class Metadata(Strict):
    """``metadata``."""

    user_id: str = Field(default="", max_length=512)


class ThinkingConfig(Strict):
    """``thinking``."""

    type: Literal["enabled", "adaptive", "disabled"]


class CacheControl(Strict):
    """``cache_control``."""

    type: Literal["ephemeral"]


class Tool(Strict):
    """One of ``tools``."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Strict):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Message(Strict):
    """One of ``messages``."""

    role: Literal["user", "assistant"]
    content: str | Listed[dict[str, Any]]


class MessagesRequest(Named):
    """Anthropic's schema without what is in :data:`UNSUPPORTED`."""

    max_tokens: int = Field(ge=1)
    messages: Listed[Message] = Field(min_length=1)
    system: str | Listed[dict[str, Any]] | None = None
    metadata: Metadata | None = None
    stop_sequences: Listed[str] | None = None
    stream: bool = False
    temperature: float = Field(default=1.0, ge=0, le=1)
    thinking: ThinkingConfig | None = None
    tool_choice: ToolChoice | None = None
    tools: Listed[Tool] | None = None
    top_k: int = Field(default=0, ge=0, lt=INT64)
    top_p: float = Field(default=1.0, gt=0, le=1)
    cache_control: CacheControl | None = None


def prepare(body: object, served: ServedModel) -> Prepared:
    """A request's body, ready to run.

    Raises:
        ApiError: what is wrong, by name.
    """
    _refuse_budget(body)
    request = read(MessagesRequest, body, UNSUPPORTED, served)
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _texts("system", request.system)})
    for index, message in enumerate(request.messages):
        messages += _converted(f"messages[{index}]", message)
    if messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    try:
        return prepare_chat(_chat_request(request, messages), messages, served)
    except ApiError as error:
        raise _renamed(error) from None
    except ValueError as error:
        raise _renamed(of_value_error(error)) from None


def _refuse_budget(body: object) -> None:
    thinking = body.get("thinking") if isinstance(body, Mapping) else None
    if isinstance(thinking, Mapping) and thinking.get("budget_tokens") is not None:
        raise not_supported("thinking.budget_tokens", "reasoning has no limit of its own; leave it out")


def _chat_request(request: MessagesRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    thinking = None
    if request.thinking is not None:
        thinking = Thinking(type="disabled" if request.thinking.type == "disabled" else "enabled")
    choice = request.tool_choice
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop=request.stop_sequences,
        stream=request.stream,
        thinking=thinking,
        tools=None if request.tools is None else [_function(tool) for tool in request.tools],
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        user="" if request.metadata is None else request.metadata.user_id,
    )


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _renamed(error: ApiError) -> ApiError:
    """With the names that Anthropic's schema has."""
    message, param = error.message, error.param or ""
    for ours, theirs in ((".function.parameters", ".input_schema"), (".function", ""), ("stop:", "stop_sequences:")):
        message, param = message.replace(ours, theirs), param.replace(ours, theirs)
    return ApiError(
        error.status, message, param="stop_sequences" if param == "stop" else param or None, code=error.code
    )


# ---- messages


def _converted(where: str, message: Message) -> list[dict[str, Any]]:
    """A message in OpenAI's form; results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = _checked_blocks(f"{where}.content", message.content, message.role)
    texts = "".join(block["text"] for block in blocks if block["type"] == "text")
    if message.role == "assistant":
        return [_answer(texts, blocks)]
    results = [
        _result(f"{where}.content[{index}]", block) for index, block in enumerate(blocks) if "tool_use_id" in block
    ]
    return results + ([{"role": "user", "content": texts}] if texts or not results else [])


def _answer(text: str, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought := "".join(block["thinking"] for block in blocks if block["type"] == "thinking"):
        message["reasoning_content"] = thought
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    return message


def _result(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    text = _texts(f"{where}.content", block.get("content", ""))
    shown = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": shown}


def _texts(where: str, content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block["text"] for block in _checked_blocks(where, content, ""))


def _checked_blocks(where: str, blocks: Sequence[object], role: str) -> list[dict[str, Any]]:
    """Blocks of a message of the role; with the role empty, of text alone."""
    return [_checked_block(f"{where}[{index}]", block, role) for index, block in enumerate(blocks)]


def _checked_block(where: str, block: object, role: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    owner, fields = _BLOCKS.get(kind, ("", None)) if isinstance(kind, str) else ("", None)
    if not isinstance(block, Mapping) or fields is None or owner not in ("", role):
        possible = [name for name, (owner, _) in _BLOCKS.items() if owner in ("", role)]
        raise not_supported(where, f"a block here is of type {', '.join(possible)}")
    kept: dict[str, Any] = {"type": kind}
    for name, value in block.items():
        if value is None or name == "type" or (name == "citations" and value == []):
            continue
        if name == "cache_control":
            if not isinstance(value, Mapping) or value.get("type") != "ephemeral" or len(value) > 1:
                raise not_supported(f"{where}.cache_control", 'give {"type": "ephemeral"}, or leave it out')
            continue
        if name not in fields:
            raise not_supported(f"{where}.{name[:60]}", f"a block of type {kind} holds {', '.join(fields)}")
        if not isinstance(value, fields[name]):
            raise bad_parameter(f"{where}.{name}", f"is of another type; see Anthropic's schema of {kind} blocks")
        kept[name] = value
    for name in fields:
        if name not in kept and name not in _OPTIONAL:
            raise bad_parameter(f"{where}.{name}", "missing; give it", "missing_required_parameter")
    return kept
