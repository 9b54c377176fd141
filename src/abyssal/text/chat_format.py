"""A model family's text as one unit: how a conversation becomes a prompt, and a model's output a message again.

A :class:`ChatFormat` holds what has to agree: the template, the form of calls, the place of reasoning.  It has a name
and a version (``deepseek-v3.1@1``), which rises whenever the same conversation would become another prompt, or the same
output another message.

    chat = ChatFormat.of_folder(path, tokenizer)
    prompt = chat.prompt(messages, tools, thinking=True)
    parser = chat.parser(prompt, tools)
    for text in stream: deltas = parser.push(text)
    deltas = parser.finish()

=================  ================  ===================================================================
family             reasoning         calls
=================  ================  ===================================================================
``deepseek-v2.5``  never             ``function<｜tool▁sep｜>NAME`` and arguments fenced as JSON
``deepseek-v3``    never             the same
``deepseek-r1``    unless told not   the same
``deepseek-v3.1``  if asked for      ``NAME<｜tool▁sep｜>ARGUMENTS``
``plain``          never             none
=================  ================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abyssal.text.chat_probe import Probed, probe
from abyssal.text.messages import Message, check_messages
from abyssal.text.output_parser import OutputParser
from abyssal.text.reasoning import R1_REASONING, V31_REASONING, PromptEnd, ReasoningSyntax, prompt_end, text_behind_tag
from abyssal.text.template import BUILTIN_TEMPLATES, ChatTemplate
from abyssal.text.template_folder import model_type, stored_templates
from abyssal.text.template_marks import THINK_TAGS
from abyssal.text.template_parts import Part, join
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tool_results import in_order_of_calls
from abyssal.text.tool_syntax import TOOL_MARKS, V3_CALLS, V31_CALLS, ToolSyntax
from abyssal.text.tools import offered_tools

FORMATS: Mapping[str, tuple[int, ToolSyntax | None, ReasoningSyntax | None]] = {
    "deepseek-v2.5": (1, V3_CALLS, None),
    "deepseek-v3": (1, V3_CALLS, None),
    "deepseek-r1": (1, V3_CALLS, R1_REASONING),
    "deepseek-v3.1": (1, V31_CALLS, V31_REASONING),
    "plain": (1, None, None),
}
"""Version, calls and reasoning of each."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation that the model is to answer."""

    parts: tuple[Part, ...]
    """For :func:`~abyssal.text.template_parts.encode_parts`; a message that spells a control token forges none."""
    end: PromptEnd
    """How it leaves the model's reasoning; ``CLOSED`` in a format without any."""
    leading: str = ""
    """What the format, and not the model, puts before an answer's text."""

    @property
    def text(self) -> str:
        return join(self.parts)


@dataclass(frozen=True)
class ChatFormat:
    """What a family's text looks like, on the way in and on the way out."""

    name: str
    version: int
    template: ChatTemplate
    """For conversations without tools."""
    tool_template: ChatTemplate
    """For those with tools, calls or results."""
    tools: ToolSyntax | None
    """None: the format has no calls."""
    reasoning: ReasoningSyntax | None
    """None: the format has no reasoning."""
    notes: tuple[str, ...] = ()
    """What a user of it should know: sentences for a log."""

    @property
    def label(self) -> str:
        """Name and version, such as ``deepseek-v3@1``."""
        return f"{self.name}@{self.version}"

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer | None = None) -> ChatFormat:
        """One of :data:`FORMATS`, with its built-in template.

        Raises:
            ValueError: no such format.
        """
        if name not in FORMATS:
            raise ValueError(f"chat format: {name!r} is unknown; give one of {', '.join(FORMATS)}")
        version, tools, reasoning = FORMATS[name]
        template = ChatTemplate.plain(tokenizer) if name == "plain" else ChatTemplate.builtin(name, tokenizer)
        return cls(name, version, template, template, tools, reasoning)

    @classmethod
    def of_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> ChatFormat:
        """The format of a model folder, told from what its chat template does; the built-in template where it has none.

        A folder that is not of these families gets the plain format, with its own template if it has one; ``notes``
        say so, and what else was found wanting.

        Raises:
            ValueError: a file that is not what its name says.
        """
        folder = Path(folder)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        if not stored_templates(folder)[0]:
            return _without_template(folder, tokenizer)
        template = ChatTemplate.from_folder(folder, tokenizer)
        if template.name in BUILTIN_TEMPLATES:
            return _checked_tokens(cls.named(template.name, tokenizer), tokenizer)
        return _checked_tokens(_with_template(template, probe(template), model_type(folder), tokenizer), tokenizer)

    def prompt(
        self, messages: Sequence[Message], tools: object = None, thinking: bool | None = None, generate: bool = True
    ) -> Prompt:
        """The prompt to answer, or to go on from where the last message is a ``prefix``.

        Reasoning in the history (``reasoning_content``) is shown where the family shows it, and dropped elsewhere.
        Results of tools are put in the order of their calls.

        Args:
            tools: in OpenAI's format; None for none.
            thinking: whether the model is to reason first; None leaves it to the format.
            generate: whether to ask for an answer; False renders the conversation alone, calls without results too.

        Raises:
            ValueError: what is wrong, led by the field; tools or thinking that the format does not have.
        """
        checked = check_messages(messages)
        if generate:
            checked = in_order_of_calls(checked)
        offered = offered_tools(tools)
        if self.tools is None and (offered or any(map(_of_tools, checked))):
            field = "tools" if offered else "messages"
            raise ValueError(f"{field}: the model's chat format ({self.label}) has no calls of tools; leave them out")
        if thinking and self.reasoning is None:
            raise ValueError(f"thinking: the model's chat format ({self.label}) has no reasoning; leave it out")
        special = offered or any(map(_of_tools, checked)) or _unfinished_thought(checked[-1])
        template = self.tool_template if special else self.template
        shown = list(tools) if offered and isinstance(tools, Sequence) else None
        parts = tuple(template.render_prompt(checked, shown, generate, thinking))
        end = PromptEnd.CLOSED if self.reasoning is None else prompt_end(parts)
        if checked[-1].get("prefix"):
            return Prompt(parts, end)
        if generate and thinking is not None:
            self._check_thinking(thinking, end)
        return Prompt(parts, end, " " if template.name == "plain" else "")

    def parser(
        self, prompt: Prompt, tools: object = None, new_id: Callable[[int], str] = "call_{}".format
    ) -> OutputParser:
        """A parser of one answer to ``prompt``.

        Args:
            tools: those offered.  Without any (``tool_choice`` is ``none``), whatever looks like a call is content.
            new_id: of a call, by its index.
        """
        begun = bool(prompt.parts) and text_behind_tag(prompt.parts)
        names = [tool.name for tool in offered_tools(tools)]
        return OutputParser(self.tools, names, self.reasoning, prompt.end, begun, prompt.leading, new_id)

    def shown(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with which an engine's text shows the marks that :meth:`parser` reads."""
        return tokenizer.showing(_marks(self))

    def _check_thinking(self, thinking: bool, end: PromptEnd) -> None:
        if not thinking and end is PromptEnd.OPEN:
            raise ValueError(f"thinking: the model's chat format ({self.label}) always reasons; leave it out")
        if thinking and end is PromptEnd.CLOSED:
            raise ValueError(
                f"thinking: the model's chat template ({self.template.name}) ends reasoning in any case; leave it out"
            )


def _of_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _unfinished_thought(message: Mapping[str, Any]) -> bool:
    """A checkpoint's template knows no reasoning in a message that the model goes on from."""
    return bool(message.get("prefix") and message.get("reasoning_content"))


def _without_template(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    v3 = ChatFormat.named("deepseek-v3", tokenizer)
    if model_type(folder) == "deepseek_v3" and set(v3.template.format_tokens) <= set(tokenizer.control_tokens):
        return replace(v3, notes=(f"{folder} has no chat template; it is taken for DeepSeek-V3",))
    note = f"{folder} has no chat template and no tokens for roles; the plain format has no tools and no reasoning"
    return replace(ChatFormat.named("plain", tokenizer), notes=(note,))


def _with_template(template: ChatTemplate, found: Probed, architecture: str | None, tokenizer: Tokenizer) -> ChatFormat:
    if not found.deepseek:
        note = f"the chat template {template.name} is of no known family; no tools and no reasoning are told apart"
        return ChatFormat("plain", FORMATS["plain"][0], template, template, None, None, notes=(note,))
    if found.reasons:
        name = "deepseek-v3.1" if found.switched else "deepseek-r1"
    else:
        name = "deepseek-v2.5" if architecture == "deepseek_v2" else "deepseek-v3"
    builtin = ChatFormat.named(name, tokenizer)
    if found.calls is not None:
        return replace(builtin, template=template, tool_template=template, tools=found.calls)
    note = (
        f"the chat template {template.name} leaves out tools or calls; where there are any, the built-in {name} is used"
    )
    return replace(builtin, template=template, notes=(note,))


def _marks(chat: ChatFormat) -> tuple[str, ...]:
    """What its parser reads."""
    return (*(TOOL_MARKS if chat.tools is not None else ()), *(THINK_TAGS if chat.reasoning is not None else ()))


def _checked_tokens(chat: ChatFormat, tokenizer: Tokenizer) -> ChatFormat:
    """Without what the tokenizer has no tokens for: a message could forge it, and the model never learned it."""
    known = set(tokenizer.control_tokens)
    if chat.tools is not None and not known.issuperset([*TOOL_MARKS, *chat.tool_template.format_tokens]):
        note = "the tokenizer has no tokens for calls, so tools are refused"
        chat = replace(chat, tools=None, notes=(*chat.notes, note))
    if chat.reasoning is not None and not known.issuperset(THINK_TAGS):
        note = "the tokenizer has no tokens for reasoning, so none is told apart"
        chat = replace(chat, reasoning=None, notes=(*chat.notes, note))
    return chat
