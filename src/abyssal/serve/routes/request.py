"""A request's body for another provider: what may be in it, and about how many tokens it may cost.

The provider checks its own parameters, but only those of OpenAI's API and a few that many know are passed on; the rest
is refused by name.  LiteLLM would take ``api_base`` from a body as well, and send the operator's key wherever a client
likes; it would fetch pictures by their addresses, and ask tools that run elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from abyssal.serve.protocol.common import check_texts
from abyssal.serve.protocol.errors import ApiError, bad_parameter, not_supported
from abyssal.serve.routes.counting import IMAGE_TOKENS, tokens_of
from abyssal.serve.routing import Kind

_SAMPLING = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "n",
        "stop",
        "max_tokens",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "user",
        "stream",
        "stream_options",
        "top_k",
        "min_p",
        "repetition_penalty",
    }
)
_CHAT = frozenset(
    {
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "logprobs",
        "top_logprobs",
        "max_completion_tokens",
        "reasoning_effort",
        "thinking",
        "verbosity",
        "safety_identifier",
        "service_tier",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "web_search_options",
    }
)
_TEXT = frozenset({"prompt", "suffix", "echo", "best_of", "logprobs"})
PARAMETERS: Mapping[Kind, frozenset[str]] = {"chat": _SAMPLING | _CHAT, "completions": _SAMPLING | _TEXT}
"""What is passed on."""

MOST_NAME = 256
"""Characters of a model's name."""
UNLIMITED_TOKENS = 4096
"""Set aside for an answer without a limit."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]*")
_PARTS = ("text", "image_url", "input_audio", "refusal")


def checked(kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what is null.

    Raises:
        ApiError: what cannot be passed on, by name.
    """
    check_texts(body)
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in PARAMETERS[kind]:
            raise bad_parameter(name[:60], "is not passed on to other providers; leave it out", "unsupported_parameter")
    _check_name(given.get("model"))
    for name, least in (("n", 1), ("best_of", 1), ("max_tokens", 0), ("max_completion_tokens", 0)):
        _check_count(name, given.get(name), least)
    _check_stream(given)
    if kind == "chat":
        _check_messages(given.get("messages"))
        _check_tools(given.get("tools"))
    elif not given.get("prompt"):
        raise bad_parameter("prompt", "missing; give a text, a list of token ids, or a list of either")
    return given


def prompt_tokens(kind: Kind, body: Mapping[str, Any]) -> int:
    """About as many as the provider will count."""
    if kind == "completions":
        prompt = body["prompt"]
        return len(prompt) if _is_tokens(prompt) else tokens_of(json.dumps(prompt, ensure_ascii=False))
    counted = sum(_message_tokens(message) for message in body["messages"])
    rest = [body[name] for name in ("tools", "response_format") if name in body]
    return counted + (tokens_of(json.dumps(rest, ensure_ascii=False)) if rest else 0)


def most_output_tokens(body: Mapping[str, Any]) -> int:
    """Of all choices together."""
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if name in body]
    prompts = body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and not _is_tokens(prompts) else 1
    return max(limits, default=UNLIMITED_TOKENS) * max(body.get("n", 1), body.get("best_of", 1)) * several


def _check_name(name: object) -> None:
    if not isinstance(name, str) or len(name) > MOST_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise ApiError(404, "There is no model of that name", "invalid_request_error", "model", "model_not_found")


def _check_count(name: str, value: object, least: int) -> None:
    if value is not None and (type(value) is not int or not least <= value < 1 << 31):
        raise bad_parameter(name, f"must be a whole number of at least {least}")


def _check_stream(body: Mapping[str, Any]) -> None:
    stream, options = body.get("stream", False), body.get("stream_options")
    if not isinstance(stream, bool):
        raise bad_parameter("stream", "must be true or false")
    if options is None:
        return
    if not stream:
        raise bad_parameter("stream_options", "only a stream has options; set stream to true, or leave it out")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise bad_parameter("stream_options", "must be an object, and holds include_usage alone")
    if not isinstance(options.get("include_usage", False), bool):
        raise bad_parameter("stream_options.include_usage", "must be true or false")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise bad_parameter("messages", "must be a list of at least one message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_parameter(where, "must be an object with a role")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise bad_parameter(f"{where}.content", "must be a text, or a list of parts")
        for index, part in enumerate(content if isinstance(content, list) else ()):
            _check_part(f"{where}.content[{index}]", part)


def _check_part(where: str, part: object) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _PARTS:
        raise bad_parameter(where, f"must be an object of type {', '.join(_PARTS)}")
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str) or not url.startswith("data:"):
            raise not_supported(f"{where}.image_url", "addresses are not fetched; send the picture as a data: URL")


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise bad_parameter("tools", "must be a list of tools")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise not_supported(f"tools[{number}]", "only tools of type function, which the client runs, are passed on")


def _message_tokens(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else ()
    images = sum(part["type"] != "text" for part in parts)
    texts = [part.get("text") for part in parts if part["type"] == "text"] if parts else [content]
    rest = {name: value for name, value in message.items() if name != "content"}
    return tokens_of(json.dumps([rest, texts], ensure_ascii=False)) + images * IMAGE_TOKENS


def _is_tokens(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)
