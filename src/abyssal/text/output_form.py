"""The form that an output must have, for an engine to enforce: JSON mode, JSON schemas, and forced or strict calls.

A request's ``response_format``, ``tools`` and ``tool_choice`` become one form: a JSON schema, or a grammar in Lark's
syntax as llguidance reads it.  In a grammar the family's markers are tokens, named by number (``<[128806]>``), whether
or not the tokenizer marks them special: text that spells a marker is not one.

====================  ================================================================================
``tool_choice``       output
====================  ================================================================================
``none``              anything but the beginning of a call
``auto``              anything, or calls; a grammar only where a tool is ``strict``, calls may not be
                      parallel, or the answer has a form itself
``required``          one call or more (one where calls may not be parallel)
a named tool          one call of it
====================  ================================================================================

Arguments follow the schema of their tool where it is ``strict`` or the call is forced, and are an object of any kind
elsewhere.  A strict schema with a keyword that llguidance does not know is refused by the engine; of one that is not,
the keyword is left out.  The engine applies a form behind the reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from abyssal.text.chat_format import ChatFormat, Prompt
from abyssal.text.reasoning import THINK_END, PromptEnd
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tool_syntax import CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, SEPARATOR, ToolSyntax
from abyssal.text.tools import Tool, offered_tools, tool_choice_of

Schema = Mapping[str, Any] | bool

ANY_OBJECT: Schema = {"type": "object"}


class OutputForm(NamedTuple):
    """Fields of the engine's ``StructuredOutput``."""

    kind: str
    """``json_schema`` or ``grammar``."""
    value: Any


def output_form(
    chat: ChatFormat,
    prompt: Prompt,
    tokenizer: Tokenizer,
    tools: object = None,
    tool_choice: object = None,
    response_format: object = None,
    parallel: bool = True,
    ends: Collection[int] | None = None,
) -> OutputForm | None:
    """The form of an answer to ``prompt``; None where it may be anything.

    Args:
        tools, tool_choice, response_format: as in a request to OpenAI's API; None where it has none.
        parallel: ``parallel_tool_calls``: whether one answer may hold several calls.
        ends: tokens that end an output; the tokenizer's own by default.

    Raises:
        ValueError: what is wrong, led by the field.
    """
    offered = offered_tools(tools)
    choice = tool_choice_of(tool_choice, offered)
    answer = response_schema(response_format)
    grammar = _Grammar(chat.tools, tokenizer, _ends(tokenizer, ends), _newlines(chat, prompt))
    if offered and chat.tools is None:
        raise ValueError(f"tools: the model's chat format ({chat.label}) has no calls of tools; leave them out")
    if choice.mode in ("required", "named"):
        if answer is not None:
            raise ValueError("response_format: an answer that has to be a call has no other form; leave one out")
        called = [tool for tool in offered if choice.name in (None, tool.name)]
        form = grammar.calls_alone(called, parallel and choice.mode == "required")
    elif choice.mode == "none" or not offered:
        form = grammar.answer_alone(answer, bool(offered))
    elif answer is None and parallel and not any(tool.strict for tool in offered):
        form = None
    else:
        form = grammar.answer_or_calls(answer, offered, parallel)
    if form is not None and prompt.end is PromptEnd.OPEN and THINK_END not in tokenizer.control_tokens:
        raise ValueError(f"the tokenizer has no token {THINK_END}, behind which the output's form would begin")
    return form


def response_schema(response_format: object) -> Schema | None:
    """The JSON schema that a ``response_format`` asks for; None for any text.

    Raises:
        ValueError: an unknown format, or a schema that is none.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise ValueError(f"response_format.type: {kind!r} must be text, json_object or json_schema")
    assert isinstance(response_format, Mapping)
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(schema, Mapping | bool):
        raise ValueError('response_format.json_schema: give {"name": ..., "schema": a JSON schema, "strict": ...}')
    strict = described.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError(f"response_format.json_schema.strict: {strict!r} must be true or false")
    return schema if strict else _lenient(schema)


class _Grammar:
    """Rules for one format and tokenizer."""

    def __init__(self, syntax: ToolSyntax | None, tokenizer: Tokenizer, ends: Sequence[int], newlines: int) -> None:
        self._syntax, self._tokenizer, self._ends, self._newlines = syntax, tokenizer, ends, newlines

    def answer_alone(self, answer: Schema | None, tools_known: bool) -> OutputForm | None:
        """Text or JSON, and no calls."""
        if answer is not None and not self._newlines:
            return OutputForm("json_schema", answer)
        if answer is not None:
            return self._form("start: LEAD answer", _json_rule("answer", answer))
        return self._form("start: text", self._text()) if tools_known else None

    def calls_alone(self, tools: Sequence[Tool], several: bool) -> OutputForm:
        """Nothing but calls."""
        return self._form("start: LEAD calls", *self._calls(tools, several, forced=True))

    def answer_or_calls(self, answer: Schema | None, tools: Sequence[Tool], several: bool) -> OutputForm:
        """An answer, or calls; with text before them where the answer may be any text."""
        calls = self._calls(tools, several, forced=False)
        if answer is None:
            return self._form("start: text calls?", self._text(), *calls)
        return self._form("start: LEAD (answer | calls)", _json_rule("answer", answer), *calls)

    def _form(self, *rules: str) -> OutputForm:
        lead = [f"LEAD: /\\n{{0,{self._newlines}}}/"] if "LEAD" in rules[0] and self._newlines else []
        first = rules[0] if lead else rules[0].replace("LEAD ", "")
        return OutputForm("grammar", "\n".join([first, *rules[1:], *lead]))

    def _text(self) -> str:
        """Any tokens but those that end the output or begin a call."""
        begins = [self._tokenizer.token_id(marker) for marker in (SECTION_BEGIN, CALL_BEGIN)]
        return f"text: <[^{','.join(map(str, sorted({*self._ends, *begins})))}]>*"

    def _calls(self, tools: Sequence[Tool], several: bool, forced: bool) -> list[str]:
        assert self._syntax is not None
        between = f"{json.dumps(self._syntax.between)} " if self._syntax.between else ""
        more = f" ({between}call)*" if several else ""
        names = " | ".join(f"call_{index}" for index in range(len(tools)))
        rules = [f"calls: {self._token(SECTION_BEGIN)} call{more} {self._token(SECTION_END)}", f"call: {names}"]
        for index, tool in enumerate(tools):
            rules.append(f"call_{index}: {self._call(tool, f'arguments_{index}')}")
            rules.append(_json_rule(f"arguments_{index}", _arguments(tool, forced)))
        return rules

    def _call(self, tool: Tool, arguments: str) -> str:
        syntax = self._syntax
        assert syntax is not None
        name = f"{tool.name}\n{syntax.fence}\n" if syntax.fence else tool.name
        pieces = [json.dumps(syntax.kind), self._token(SEPARATOR), json.dumps(name)]
        if not syntax.kind:
            pieces = [json.dumps(name), self._token(SEPARATOR)]
        close = [json.dumps(syntax.close)] if syntax.close else []
        return " ".join([self._token(CALL_BEGIN), *pieces, arguments, *close, self._token(CALL_END)])

    def _token(self, name: str) -> str:
        return f"<[{self._tokenizer.token_id(name)}]>"


def _ends(tokenizer: Tokenizer, ends: Collection[int] | None) -> list[int]:
    if ends is not None:
        return sorted(ends)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _newlines(chat: ChatFormat, prompt: Prompt) -> int:
    """Line ends that the family puts between reasoning and answer."""
    return chat.reasoning.after_end if chat.reasoning is not None and prompt.end is PromptEnd.OPEN else 0


def _arguments(tool: Tool, forced: bool) -> Schema:
    if tool.strict:
        return tool.parameters
    return _lenient(tool.parameters) if forced else ANY_OBJECT


def _lenient(schema: Schema) -> Schema:
    """Without what llguidance does not know."""
    return {**schema, "x-guidance": {"lenient": True}} if isinstance(schema, Mapping) else schema


def _json_rule(name: str, schema: Schema) -> str:
    try:
        return f"{name}: %json {json.dumps(schema)}"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a JSON schema that is not JSON ({error})") from error
