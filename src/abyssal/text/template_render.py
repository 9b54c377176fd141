"""One conversation through one template: the rendering, its marks, and the ranges of it that are learned.

Ranges come from ``{% generation %}`` where the template has it.  Otherwise they are found by comparing renderings of
the conversation's beginnings, and a template for which that cannot work is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from abyssal.text.messages import Message, check_messages, check_tools
from abyssal.text.template_marks import (
    ControlNames,
    answer_spans,
    choose_marks,
    cut_parts,
    end_of_answer,
    mark_written,
    unmark,
)
from abyssal.text.template_parts import Part
from abyssal.text.template_sandbox import run_template

_SEARCHED_MESSAGES = 64
_FIX = "or name a template: deepseek-v3, deepseek-r1, deepseek-v3.1, deepseek-v2.5"


class EarlierAnswersChange(ValueError):
    """A template shows an answer otherwise once the conversation goes on, as those that drop reasoning do."""


@dataclass(frozen=True)
class Program:
    """A compiled template and what it is run with."""

    name: str
    """What errors call it."""
    source: str
    compiled: jinja2.Template
    bos_token: str
    eos_token: str
    names: ControlNames
    """Of the control tokens, which a message may not forge."""
    builtin: bool
    """Whether it knows ``weight`` and ``prefix`` itself."""


class Rendering:
    """A conversation, checked, and marked where a message spells a control token.

    Raises:
        ValueError: messages or tools that are none.
    """

    def __init__(
        self,
        program: Program,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool | None,
    ) -> None:
        self._program = program
        self._plain_messages, self._plain_tools = check_messages(messages), check_tools(tools)
        self._thinking = thinking
        self._marks = choose_marks(self._plain_messages, self._plain_tools, program.source)

    @cached_property
    def _messages(self) -> list[dict[str, Any]]:
        return mark_written(self._plain_messages, self._program.names, self._marks)

    @cached_property
    def _tools(self) -> list[dict[str, Any]] | None:
        return mark_written(self._plain_tools, self._program.names, self._marks)

    @cached_property
    def _names_are_written(self) -> bool:
        """Whether a message or a tool spells a control token."""
        return self._messages != self._plain_messages or self._tools != self._plain_tools

    @property
    def _who(self) -> str:
        return f"chat template {self._program.name}"

    def text(self, add_generation_prompt: bool) -> str:
        """The rendered string."""
        return self._run(self._plain_messages, self._plain_tools, add_generation_prompt, None)

    def prompt(self, add_generation_prompt: bool) -> list[Part]:
        """The rendering as parts of which none is trained."""
        return cut_parts(self._checked(add_generation_prompt), (), self._marks)

    def parts(self) -> list[Part]:
        """The whole conversation as parts with what is learned."""
        if self._names_are_written:
            self._checked(False)
        tagged = "endgeneration" in self._program.source
        text, spans = self._spans_by_tag() if tagged else self._spans_by_prefix()
        return cut_parts(text, spans, self._marks)

    def _marked(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self._run(messages, self._tools, add_generation_prompt, self._marks.answer)

    def _spans_by_tag(self) -> tuple[str, list[tuple[int, int]]]:
        try:
            text, spans = answer_spans(self._marked(self._messages), self._marks)
        except ValueError as error:
            raise ValueError(f"{self._who}: {error}") from error
        if self._program.builtin:
            return text, spans
        answers = [message for message in self._messages if message["role"] == "assistant"]
        if any(message.get("weight") == 0 for message in answers):
            if len(spans) != len(answers):
                raise ValueError(
                    f"{self._who}: marks {len(spans)} generations for {len(answers)} messages of "
                    "the assistant, so their weights have no place; leave weight out, or name another template"
                )
            spans = [span for span, message in zip(spans, answers, strict=True) if message.get("weight") != 0]
        return text, spans

    def _spans_by_prefix(self) -> tuple[str, list[tuple[int, int]]]:
        whole = self._marked(self._messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(self._messages):
            if not learned(message):
                continue
            prompt = self._marked(self._messages[:index], True)
            answered = whole if index + 1 == len(self._messages) else self._marked(self._messages[: index + 1])
            if not answered.startswith(prompt):
                raise ValueError(
                    f"{self._who}: messages[{index}] is rendered otherwise than its generation "
                    f"prompt (…{unmark(prompt[-30:], self._marks)!r}) begins it, so what to learn cannot be told; "
                    f"put the answer between {{% generation %}} and {{% endgeneration %}}, {_FIX}"
                )
            if not whole.startswith(answered):
                raise EarlierAnswersChange(
                    f"{self._who}: messages[{index}] is rendered otherwise once messages follow "
                    "it (a template that drops earlier reasoning does so), so what to learn cannot be told; cut the "
                    f"conversation behind it, {_FIX}"
                )
            answer = answered[len(prompt) :]
            spans.append((len(prompt), len(prompt) + end_of_answer(answer, self._program.names, self._marks)))
        return whole, spans

    def _checked(self, add_generation_prompt: bool) -> str:
        """The rendering with the marks of written names, the same as it would be without them.

        Raises:
            ValueError: the template shows text with marks otherwise.
        """
        text = self._run(self._messages, self._tools, add_generation_prompt, None)
        if self._names_are_written:
            plain = self._run(self._plain_messages, self._plain_tools, add_generation_prompt, None)
            if unmark(text, self._marks) != plain:
                raise ValueError(
                    f"{self._who}: a message spells a control token, which the template reads; "
                    "take the control token's name out of the message"
                )
        return text

    def _run(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        marks: tuple[str, str] | None,
    ) -> str:
        unfinished = bool(messages and messages[-1].get("prefix"))
        if unfinished and not self._program.builtin:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + self._marks.cut}]
        variables = {
            "tools": tools,
            "bos_token": self._program.bos_token,
            "eos_token": self._program.eos_token,
            "add_generation_prompt": add_generation_prompt and not unfinished,
        }
        if self._thinking is not None:
            variables |= {"thinking": self._thinking, "enable_thinking": self._thinking}
        try:
            text = run_template(self._program.compiled, {**variables, "messages": messages}, marks)
        except ValueError as error:
            where = self._failing(messages, variables)
            raise ValueError(f"{self._who}: {where}{error}") from error
        if unfinished and not self._program.builtin:
            text, found, _ = text.rpartition(self._marks.cut)
            if not found:
                raise ValueError(
                    f"{self._who}: does not show the end of messages[{len(messages) - 1}], "
                    "so it cannot be left open; remove prefix"
                )
        return text

    def _failing(self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The first message with which rendering fails, for an error."""
        for count in range(1, min(len(messages), _SEARCHED_MESSAGES) + 1):
            try:
                run_template(self._program.compiled, {**variables, "messages": messages[:count]})
            except ValueError:
                return f"messages[{count - 1}] ({messages[count - 1]['role']}): "
        return ""


def learned(message: Mapping[str, Any]) -> bool:
    """Whether a checked message is an answer to be learned."""
    return message["role"] == "assistant" and message.get("weight") != 0
