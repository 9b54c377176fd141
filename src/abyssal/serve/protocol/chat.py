"""``/v1/chat/completions`` and ``/beta/chat/completions``: requests in.  Answers: :mod:`.chat_reply`.

Beyond OpenAI's schema there are DeepSeek's ``thinking``, ``reasoning_content`` of earlier answers and, on ``/beta``,
``prefix: true`` of the last message, and some sampling parameters of vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal
from uuid import uuid4

from pydantic import Field

from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.serve.events import Prepared
from abyssal.serve.protocol.common import (
    Listed,
    SamplingFields,
    Strict,
    Unsupported,
    check_bytes,
    check_length,
    num_bytes,
    read,
    sampling_params,
)
from abyssal.serve.protocol.errors import bad_parameter, far_too_long, not_supported, of_value_error
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.chat_format import Prompt
from abyssal.text.output_form import output_form
from abyssal.text.output_parser import OutputParser
from abyssal.text.template_parts import encode_parts

UNSUPPORTED: Mapping[str, Unsupported] = {
    "audio": Unsupported((), "this server answers in text; leave it out"),
    "function_call": Unsupported((), "it is deprecated; use tool_choice"),
    "functions": Unsupported((), "it is deprecated; use tools"),
    "metadata": Unsupported(({},), "answers are not stored; leave it out"),
    "modalities": Unsupported((["text"],), 'this server answers in text; give ["text"], or leave it out'),
    "moderation": Unsupported((), "this server has no moderation; leave it out"),
    "prediction": Unsupported((), "predicted outputs are not used; leave it out"),
    "prompt_cache_key": Unsupported((), "prompts are cached by their tokens and the API key; leave it out"),
    "prompt_cache_retention": Unsupported(
        ("in_memory",), "how long prompts are cached is the operator's; leave it out"
    ),
    "reasoning_effort": Unsupported(
        (), 'there are no grades of effort; use thinking: {"type": "enabled" | "disabled"}'
    ),
    "service_tier": Unsupported(("auto", "default"), "there is one tier; give auto or default, or leave it out"),
    "store": Unsupported((False,), "answers are not stored; give false, or leave it out"),
    "verbosity": Unsupported(("medium",), "ask for it in a message; give medium, or leave it out"),
    "web_search_options": Unsupported((), "this server does not search; leave it out"),
}

MOST_TOOLS = 512
"""Of one request; OpenAI and DeepSeek take 128."""
MOST_FORM_BYTES = 128 << 10
"""Of the schemas or the grammar that an answer must follow: the engine reads them between two steps."""
_LEAST_SHOWN = 4
"""A template shows more than one part in so many of what messages and tools say."""

_EVERY_ROLE = frozenset({"role", "content"})
_FIELDS: Mapping[str, frozenset[str]] = {
    "system": _EVERY_ROLE,
    "developer": _EVERY_ROLE,
    "user": _EVERY_ROLE,
    "assistant": _EVERY_ROLE | {"tool_calls", "reasoning_content", "prefix"},
    "tool": _EVERY_ROLE | {"tool_call_id", "name"},
}
"""What a message may hold.  A result's ``name`` is that of its call, which the model reads there."""
_EMPTY_FIELDS: Mapping[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],), "prefix": (False,)}
"""Values of a message's fields that say nothing, as clients send answers back."""


class Thinking(Strict):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class ChatRequest(SamplingFields):
    """OpenAI's schema without what is in :data:`UNSUPPORTED`, and DeepSeek's extras."""

    messages: Listed[dict[str, Any]] = Field(min_length=1)
    tools: Listed[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    thinking: Thinking | None = None
    safety_identifier: str = Field(default="", max_length=512)
    """OpenAI's new name for ``user``."""


def prepare(body: object, served: ServedModel, beta: bool = False) -> Prepared:
    """A request's body, ready to run.

    Args:
        beta: whether the path is ``/beta``, where the last message may be a ``prefix``.

    Raises:
        ApiError: what is wrong, by name.
    """
    request = read(ChatRequest, body, UNSUPPORTED, served)
    messages = checked_messages(request.messages, beta)
    try:
        return prepare_chat(request, messages, served)
    except ValueError as error:
        raise of_value_error(error) from None


def prepare_chat(request: ChatRequest, messages: Sequence[Mapping[str, Any]], served: ServedModel) -> Prepared:
    """Of a valid request.

    Raises:
        ValueError: from the chat format, led by the field.
        ApiError: from the parameters.
    """
    thinking = None if request.thinking is None else request.thinking.type == "enabled"
    _check_extent(request, messages, served)
    prompt = served.chat.prompt(messages, request.tools, thinking)
    check_bytes(sum(len(part.text.encode()) for part in prompt.parts), served)
    ids = tuple(encode_parts(served.tokenizer, prompt.parts).ids.tolist())
    max_tokens = _max_tokens(request)
    check_length(len(ids), max_tokens, served)
    shown_tools = None if request.tool_choice == "none" else request.tools
    params = _params(request, prompt, max_tokens, served)
    if params.structured is not None and messages[-1].get("prefix"):  # a form is followed from its own beginning
        name = "tool_choice" if request.response_format is None else "response_format"
        raise bad_parameter(name, "the answer's form does not go on from a prefix; leave out one of them")
    return Prepared(
        prompts=(ids,),
        params=params,
        model=request.model,
        stream=request.stream,
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        parse=partial(_parser, served, prompt, shown_tools),
        think=served.think_tokens(prompt),
        user=request.user or request.safety_identifier,
        priority=request.priority,
        form_name=_form_name(request),
    )


def _check_extent(request: ChatRequest, messages: Sequence[Mapping[str, Any]], served: ServedModel) -> None:
    """Whether it is worth the work to write the conversation out."""
    if len(request.tools or []) > MOST_TOOLS:
        raise bad_parameter("tools", f"{len(request.tools or [])} tools; give at most {MOST_TOOLS}")
    if len(messages) > served.max_length:  # each has a token of its own
        raise far_too_long(len(messages), served.max_length)
    texts = num_bytes([message.get("content") for message in messages]) + num_bytes(request.tools)
    check_bytes(texts // _LEAST_SHOWN, served)


def checked_messages(messages: Sequence[Mapping[str, Any]], beta: bool) -> list[dict[str, Any]]:
    """The messages without fields that say nothing.

    Raises:
        ApiError: a field that the message's role does not have, or that would be ignored.
    """
    return [_checked_message(f"messages[{index}]", message, beta) for index, message in enumerate(messages)]


def _checked_message(where: str, message: Mapping[str, Any], beta: bool) -> dict[str, Any]:
    role = message.get("role")
    allowed = _FIELDS.get(role) if isinstance(role, str) else None
    kept: dict[str, Any] = {}
    for name, value in message.items():
        if value is None or any(value == empty for empty in _EMPTY_FIELDS.get(name, ())):
            continue
        if allowed is not None and name not in allowed:
            shown = name if len(name) <= 60 else name[:57] + "..."
            raise not_supported(f"{where}.{shown}", f"a message of role {role} holds {', '.join(sorted(allowed))}")
        kept[name] = value
    if "prefix" in kept:
        if kept["prefix"] is not True:
            raise bad_parameter(f"{where}.prefix", "must be true or false")
        if not beta:
            raise not_supported(f"{where}.prefix", "prefix completion is at /beta/chat/completions")
    if role == "tool" and not isinstance(kept.get("tool_call_id"), str):
        raise bad_parameter(f"{where}.tool_call_id", "missing; give the id of the call that this is the result of")
    _check_parts(where, kept.get("content"))
    return kept


def _check_parts(where: str, content: object) -> None:
    """Of a content in parts: that each is text and nothing else; its type is checked with the conversation."""
    for index, part in enumerate(content if isinstance(content, list) else ()):
        others = sorted(set(part) - {"type", "text"}) if isinstance(part, dict) and part.get("type") == "text" else []
        if others:
            raise not_supported(f"{where}.content[{index}].{others[0][:60]}", "a part holds type and text")


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_parameter("max_completion_tokens", f"{new} is not max_tokens, {old}; give one of them")
    return new if old is None else old


def _form_name(request: ChatRequest) -> str:
    return "tools" if request.response_format is None else "response_format"


def _params(request: ChatRequest, prompt: Prompt, max_tokens: int | None, served: ServedModel) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_parameter("top_logprobs", "needs logprobs: true")
    form = output_form(
        served.chat,
        prompt,
        served.tokenizer,
        request.tools,
        request.tool_choice,
        request.response_format,
        request.parallel_tool_calls,
        served.ends or None,
    )
    if form is not None and (size := num_bytes(form.value)) > MOST_FORM_BYTES:
        raise bad_parameter(_form_name(request), f"a form of {size} bytes; give at most {MOST_FORM_BYTES}")
    structured = None if form is None else StructuredOutput(form.kind, form.value)  # pyright: ignore[reportArgumentType]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return sampling_params(request, served, max_tokens=max_tokens, logprobs=logprobs, structured=structured)


def _parser(served: ServedModel, prompt: Prompt, tools: list[dict[str, Any]] | None, choice: int) -> OutputParser:
    """Of one choice.  Calls have ids that no other answer's have."""
    return served.chat.parser(prompt, tools, lambda index: f"call_{uuid4().hex[:24]}")
