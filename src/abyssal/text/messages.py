"""Conversations in OpenAI's message format: what is accepted, and errors that say which message and field is wrong.

    {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text or [{"type": "text", "text": ...}]}

An assistant's message may hold ``tool_calls`` (then its content may be missing or null), ``reasoning_content`` (its
thinking, as DeepSeek's API has it), ``weight`` (0: not learned, 1) and, as the last message, ``prefix`` (true: the
message is unfinished, and the model is to go on from it).  Other fields are handed to the template as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages, plain: ``developer`` become ``system``, lists of texts one text, absent content an empty one.

    Raises:
        ValueError: what is wrong, led by the field, such as ``messages[2].content``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: {_shown(messages)} must be a list of at least one message")
    checked = [_message(index, message) for index, message in enumerate(messages)]
    for index, message in enumerate(checked[:-1]):
        if message.get("prefix"):
            raise ValueError(f"messages[{index}].prefix: only the last message can be left open; remove it")
    return checked


def check_tools(tools: object) -> list[dict[str, Any]] | None:
    """The tools, or None where there are none.

    Raises:
        ValueError: not a list of functions with names.
    """
    if tools is None or tools == []:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"tools: {_shown(tools)} must be a list")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'tools[{index}]: {_shown(tool)} must be {{"type": "function", "function": {{"name": ..., ...}}}}'
            )
    return [dict(tool) for tool in tools]


def _message(index: int, message: object) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f'{where}: {_shown(message)} must be an object with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: {_shown(role)} is unknown; give one of {', '.join(ROLES)}")
    checked = dict(message)
    checked["role"] = "system" if role == "developer" else role
    assistant = role == "assistant"
    calls = message.get("tool_calls")
    if calls is not None:
        if not assistant:
            raise ValueError(f"{where}.tool_calls: only an assistant calls tools; this is a message of role {role}")
        checked["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    if not checked.get("tool_calls"):
        checked.pop("tool_calls", None)
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"{where}.reasoning_content: {_shown(reasoning)} must be text")
    optional = "tool_calls" in checked or (assistant and bool(message.get("prefix")) and reasoning is not None)
    checked["content"] = _content(f"{where}.content", message.get("content"), optional)
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{where}.weight: {_shown(weight)} must be 0 (not learned) or 1")
    if message.get("prefix") and not assistant:
        raise ValueError(f"{where}.prefix: only an assistant's message can be gone on from; this is of role {role}")
    return checked


def _content(where: str, content: object, optional: bool) -> str:
    if content is None:
        if optional:
            return ""
        raise ValueError(f'{where}: missing; give text, "" if there is none')
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: {_shown(content)} must be text or a list of texts")
    texts: list[str] = []
    for index, item in enumerate(content):
        text = item.get("text") if isinstance(item, Mapping) and item.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(f'{where}[{index}]: {_shown(item)} must be {{"type": "text", "text": ...}}; text alone')
        texts.append(text)
    return "".join(texts)


def _calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}: {_shown(calls)} must be a list")
    checked: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'{where}[{index}].function: {_shown(function)} must be {{"name": ..., "arguments": ...}}')
        if not isinstance(function.get("arguments"), str | Mapping):
            raise ValueError(
                f"{where}[{index}].function.arguments: {_shown(function.get('arguments'))} must be JSON as text"
            )
        if not isinstance(call.get("id"), str | None):
            raise ValueError(f"{where}[{index}].id: {_shown(call.get('id'))} must be text")
        if call.get("type") not in (None, "function"):
            raise ValueError(f"{where}[{index}].type: {_shown(call['type'])} is not supported; give function")
        checked.append({**call, "type": "function", "function": dict(function)})
    return checked


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
