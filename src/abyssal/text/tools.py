"""Tools of a request, in OpenAI's format: what is offered to the model, and which it may or must call.

{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema, "strict": bool}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.text.messages import check_tools

NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.:/")
"""Of a tool's name: OpenAI's, and three that other servers' tools have.  No chat format's frame has them."""
MOST_NAME = 128
"""Characters of a name."""
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of a function without ``parameters``: OpenAI reads it as one without arguments."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    strict: bool
    """Whether the arguments have to follow the schema."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called."""

    mode: str
    """``none``, ``auto``, ``required`` (one at least) or ``named`` (that one, once)."""
    name: str | None = None


def offered_tools(tools: object) -> tuple[Tool, ...]:
    """The tools of a request; empty where there are none.

    Raises:
        ValueError: what is wrong, led by the field, such as ``tools[1].function.name``.
    """
    offered: list[Tool] = []
    for index, tool in enumerate(check_tools(tools) or ()):
        where, function = f"tools[{index}].function", tool["function"]
        if tool.get("type", "function") != "function":
            raise ValueError(f"tools[{index}].type: {tool['type']!r} is not supported; give function")
        name = function["name"]
        if not 1 <= len(name) <= MOST_NAME or not NAME_CHARACTERS.issuperset(name):
            raise ValueError(
                f"{where}.name: {name[: MOST_NAME + 1]!r} must be 1 to {MOST_NAME} letters (a-z, A-Z), digits or _-.:/"
            )
        if any(name == other.name for other in offered):
            raise ValueError(f"{where}.name: {name!r} is offered twice; name each tool otherwise")
        strict = function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise ValueError(f"{where}.strict: {strict!r} must be true or false")
        offered.append(Tool(name, _parameters(where, function.get("parameters")), bool(strict)))
    return tuple(offered)


def tool_choice_of(choice: object, offered: Sequence[Tool]) -> ToolChoice:
    """The request's ``tool_choice``; without one ``auto`` where tools are offered.

    Raises:
        ValueError: an unknown choice, or a tool that is not offered.
    """
    if choice is None:
        return ToolChoice("auto" if offered else "none")
    if choice == "none":
        return ToolChoice("none")
    if choice not in ("auto", "required") and not (isinstance(choice, Mapping) and choice.get("type") == "function"):
        raise ValueError(
            f"tool_choice: {choice!r} must be none, auto, required or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if not offered:
        raise ValueError("tool_choice: there are no tools to choose from; give tools, or leave it out")
    if isinstance(choice, str):
        return ToolChoice(choice)
    assert isinstance(choice, Mapping)
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not any(name == tool.name for tool in offered):
        known = ", ".join(tool.name for tool in offered)
        raise ValueError(f"tool_choice.function.name: {name!r} is not among the tools offered: {known}")
    return ToolChoice("named", name)


def _parameters(where: str, parameters: object) -> Mapping[str, Any]:
    if parameters is None:
        return NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f'{where}.parameters: must be a JSON schema of {{"type": "object"}}; arguments are an object')
    return {"type": "object", **parameters}
