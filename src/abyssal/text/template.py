"""Chat templates: a conversation as the text that a model was, or is to be, trained on.

A :class:`ChatTemplate` is the checkpoint's own Jinja template, run in a sandbox, or one of those written here for
DeepSeek's published formats (``text/templates``).  It renders

- a string (:meth:`~ChatTemplate.render`), equal to transformers' ``apply_chat_template``;
- the parts of a prompt (:meth:`~ChatTemplate.render_prompt`), in which a message that spells ``<｜Assistant｜>`` is
  told from the template that writes it; and
- for training (:meth:`~ChatTemplate.render_parts`), the same with what the model learns: the words of the assistant,
  tool calls included, and the token that ends them.

What is learned is known from ``{% generation %}`` where a template has it, as ours do.  Otherwise it is found by
comparing: the rendering of the conversation up to an answer, with the generation prompt, must begin the rendering with
the answer, and that must begin the whole.  Templates that do not keep to this are refused with the reason.

Formats that drop earlier reasoning (R1, V3.1) show an earlier answer otherwise than the model wrote it.
:meth:`~ChatTemplate.render_samples` therefore gives such answers a sample of their own, which ends with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from abyssal.text.messages import Message, check_messages
from abyssal.text.template_folder import model_type, stored_templates
from abyssal.text.template_marks import ControlNames
from abyssal.text.template_parts import Part
from abyssal.text.template_render import EarlierAnswersChange, Program, Rendering, learned
from abyssal.text.template_sandbox import compile_template
from abyssal.text.tokenizer import BOS, EOS, Tokenizer

BUILTIN_TEMPLATES = ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v2.5")


class ChatTemplate:
    """A template, with the tokens that it names."""

    def __init__(
        self,
        source: str,
        name: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        control_tokens: Sequence[str] = (),
        tool_source: str | None = None,
    ) -> None:
        """
        Args:
            source: Jinja.
            name: what errors call it: a file, or the name of a builtin.
            control_tokens: names that a message may not forge; the tokenizer's, usually.
            tool_source: another template for conversations with tools.

        Raises:
            ValueError: not Jinja.
        """
        self.source, self.name = source, name
        bos_token, eos_token = bos_token or "", eos_token or ""
        names = ControlNames.of([*control_tokens, bos_token, eos_token])
        self._builtin = name in BUILTIN_TEMPLATES

        def program(source: str) -> Program:
            try:
                compiled = compile_template(source)
            except ValueError as error:
                raise ValueError(f"chat template {name}: {error}") from error
            return Program(name, source, compiled, bos_token, eos_token, names, self._builtin)

        self._plain = program(source)
        self._with_tools = self._plain if tool_source is None else program(tool_source)

    @classmethod
    def builtin(cls, name: str, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """One of :data:`BUILTIN_TEMPLATES`, ending answers with the tokenizer's end-of-sentence token.

        Raises:
            ValueError: no such template.
        """
        if name not in BUILTIN_TEMPLATES:
            raise ValueError(f"template: {name!r} is unknown; give one of {', '.join(BUILTIN_TEMPLATES)}")
        source = _builtin_source(name)
        bos, eos = _sentence_tokens(tokenizer)
        known = () if tokenizer is None else tokenizer.control_tokens
        return cls(source, name, bos, eos, (*_format_tokens(source), *known))

    @classmethod
    def plain(cls, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """``User: ...``, ``Assistant: ...``: for models that know no format, or DeepSeek-V2's and LLM's."""
        bos, eos = _sentence_tokens(tokenizer)
        return cls(_builtin_source("plain"), "plain", bos, eos, () if tokenizer is None else tokenizer.control_tokens)

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template of a model folder: ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``
        (text, or a list of named templates, of which ``tool_use`` is for conversations with tools).

        A folder of DeepSeek-V3's architecture without one gets the builtin ``deepseek-v3``.

        Args:
            tokenizer: the folder's; read from there by default.

        Raises:
            ValueError: no template, or one that cannot be read.
        """
        folder = Path(folder)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        sources, name = stored_templates(folder)
        if not sources:
            if model_type(folder) == "deepseek_v3":
                return cls.builtin("deepseek-v3", tokenizer)
            raise ValueError(f"{folder}: has no chat template; name one of {', '.join(BUILTIN_TEMPLATES)} (--template)")
        if "default" not in sources:
            raise ValueError(f"{name}: has the templates {', '.join(sources)} but none named default; name one so")
        for builtin in BUILTIN_TEMPLATES:
            if sources["default"] == _builtin_source(builtin):
                return cls.builtin(builtin, tokenizer)
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        bos, eos = ("" if token_id is None else tokenizer.decode([token_id]) for token_id in ids)
        return cls(sources["default"], name, bos, eos, tokenizer.control_tokens, sources.get("tool_use"))

    @property
    def format_tokens(self) -> tuple[str, ...]:
        """Control tokens that a builtin format writes besides those that begin and end a text; a tokenizer without
        them would spell them out, where a message could forge them.  Of other templates they are not known."""
        return _format_tokens(self.source) if self._builtin else ()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """The conversation as text.  For a prompt to be encoded take :meth:`render_prompt`, which cannot be forged.

        Args:
            messages: see :mod:`abyssal.text.messages`.
            thinking: whether the model is to reason first; None leaves it to the template and the messages.

        Raises:
            ValueError: messages that are none, or what the template objects to.
        """
        return self._rendering(messages, tools, thinking).text(add_generation_prompt)

    def render_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> list[Part]:
        """:meth:`render` as parts, none of them trained, for :func:`~abyssal.text.template_parts.encode_parts`."""
        return self._rendering(messages, tools, thinking).prompt(add_generation_prompt)

    def render_parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> list[Part]:
        """A whole conversation as parts with what is learned of it; they join to what :meth:`render` gives.

        Messages of the assistant with ``weight: 0`` are not learned, nor are those that the format shows otherwise
        than the model writes them (R1: answers of earlier turns, whose reasoning it drops).

        Raises:
            ValueError: as :meth:`render`, and a template whose answers cannot be found.
        """
        return self._rendering(messages, tools, thinking).parts()

    def render_samples(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> list[list[Part]]:
        """:meth:`render_parts` of the conversation and, where the format shows answers otherwise once it goes on, of
        its beginnings up to them, so that each answer is learned once and as the model is to write it."""
        checked = check_messages(messages)
        if self.name == "deepseek-r1":
            samples = _up_to_each_answer(checked)
        elif self.name == "deepseek-v3.1":
            turns = _up_to_each_turn(checked)
            samples = [*(turn for turn in turns[:-1] if any(map(_reasons, turn))), checked]
        else:
            samples = [checked]
        try:
            return [self.render_parts(sample, tools, thinking) for sample in samples]
        except EarlierAnswersChange:
            return [self.render_parts(sample, tools, thinking) for sample in _up_to_each_answer(checked)]

    def _rendering(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, thinking: bool | None
    ) -> Rendering:
        return Rendering(self._with_tools if tools else self._plain, messages, tools, thinking)

    def attach(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with this template, and with the control tokens that a builtin writes: what to save."""
        tokenizer = tokenizer.with_control_tokens(self.format_tokens)
        if self._with_tools is self._plain:
            return tokenizer.with_chat_template(self.source)
        named = {"default": self.source, "tool_use": self._with_tools.source}
        return tokenizer.with_chat_template([{"name": name, "template": source} for name, source in named.items()])


def _reasons(message: Mapping[str, Any]) -> bool:
    return learned(message) and (message.get("reasoning_content") is not None or "</think>" in message["content"])


def _up_to_each_turn(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Beginnings of the conversation, each up to the user's next message and with the answers before it alone to be
    learned."""
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    bounds = [0, *asked[1:], len(messages)]
    return [[*_unlearned(messages[:begin]), *messages[begin:end]] for begin, end in pairwise(bounds)]


def _up_to_each_answer(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Beginnings of the conversation, each ending with the one answer to be learned."""
    answers = [index for index, message in enumerate(messages) if learned(message)]
    return [[*_unlearned(messages[:index]), messages[index]] for index in answers]


def _unlearned(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _format_tokens(source: str) -> tuple[str, ...]:
    """DeepSeek's control tokens in a builtin's text, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"<｜[^｜]+｜>|</?think>", source))))


def _sentence_tokens(tokenizer: Tokenizer | None) -> tuple[str, str]:
    """Names of the tokens that begin and end a text; DeepSeek's where there is no tokenizer."""
    if tokenizer is None:
        return BOS, EOS
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no eos_token, which ends an answer; set it in tokenizer_config.json")
    bos = tokenizer.bos_token_id
    return "" if bos is None else tokenizer.decode([bos]), tokenizer.decode([tokenizer.eos_token_id])


def _builtin_source(name: str) -> str:
    return resources.files("abyssal.text").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
