"""Output that has a given form: a JSON schema, a regular expression, one of several texts, or a grammar.

llguidance reads the form and says at each step which tokens may come.  A structure begins where the reasoning part ends
(at its end token; until then everything may come but the output's end), and it can look ahead along drafts and come
back, which is what verification needs: one mask for each draft and one after them.  llguidance rather than xgrammar,
which needs torch and transformers; it is loaded when the first structured request arrives.

A form that nothing meets is refused when it is compiled.  One that llguidance cannot read (such as look-ahead in a
regular expression, or a keyword of JSON schema that is new to it) is refused too, instead of being met in part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.engine.messages import StructuredOutput
from abyssal.engine.schema import endless_reference

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from abyssal.text.tokenizer import Tokenizer

REASONING_MARKS = ("<think>", "</think>")
"""DeepSeek-R1's and V3.1's.  Their chat templates put the first at the end of the prompt."""

MOST_REASON = 200
"""Characters of a message's line that are passed on: it may quote the whole form."""


class StructureCompiler:
    """Forms for one tokenizer and model; the tokenizer is prepared once, when first needed."""

    def __init__(self, tokenizer_json: str, vocab_size: int, ends: Sequence[int]) -> None:
        """
        Args:
            tokenizer_json: content of ``tokenizer.json``.
            vocab_size: width of the model's logits, at least the tokenizer's.
            ends: the model's end tokens, by any of which a complete structure ends.
        """
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._ends = list(ends)
        self._tokenizer: LLTokenizer | None = None

    def prepare(self) -> None:
        """Prepare the tokenizer now: with a large vocabulary it takes a second, which the first form's request and all
        others beside it would wait.  One that cannot be used is reported by that request."""
        if self._ends:
            with suppress(ValueError):
                self._prepared()

    def compile(self, form: StructuredOutput, reasoning_end: int | None = None) -> Structure:
        """A structure at its beginning.

        Args:
            reasoning_end: the token that ends the reasoning part; None where the output has none, or the prompt has
                ended it already.

        Raises:
            ValueError: the form cannot be read, or cannot be met.
        """
        from llguidance import LLMatcher

        if not self._ends:
            raise ValueError("structured: the model names no end token, which a complete structure ends with")
        grammar = _grammar(form)
        matcher = LLMatcher(self._prepared(), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"structured: the {form.kind} cannot be used: {_reason(matcher.get_error())}")
        mask = matcher.compute_bitmask()
        if matcher.is_error() or not any(mask):
            raise ValueError(f"structured: the {form.kind} cannot be met: there is no text of this form")
        return Structure(matcher, form.kind, self._ends, reasoning_end, self._reasoning_mask())

    def _reasoning_mask(self) -> np.ndarray:
        """An output that ended in its reasoning part would not have the form."""
        allowed_V = np.ones(self._vocab_size, np.uint8)
        allowed_V[self._ends] = 0
        return np.packbits(allowed_V, bitorder="little")

    def _prepared(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            content = _without_control_tokens(self._tokenizer_json)
            self._tokenizer = LLTokenizer(content, n_vocab=self._vocab_size, eos_token=self._ends)
        return self._tokenizer


class Structure:
    """How far one output is in its form."""

    def __init__(
        self,
        matcher: LLMatcher,
        kind: str,
        ends: Sequence[int],
        reasoning_end: int | None,
        reasoning_mask: np.ndarray,
    ) -> None:
        self._matcher = matcher
        self._kind = kind
        self._ends = ends
        self._awaited = reasoning_end
        self._reasoning_mask = reasoning_mask
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may come: the output may as well end here."""
        return self._awaited is None and self._matcher.is_stopped()

    def fork(self) -> Structure:
        """One that goes on by itself, for another completion of the same prompt."""
        matcher = self._matcher.deep_copy()
        other = Structure(matcher, self._kind, self._ends, self._awaited, self._reasoning_mask)
        other._ended = self._ended
        return other

    def masks(self, drafts: Sequence[int] = ()) -> list[np.ndarray | None]:
        """What may come now and after each draft: bits by token, lowest first (uint8).

        ``len(drafts) + 1`` of them.  Those after a draft that may not come, or that ends the output, are never used,
        and None.  The structure stays where it is.

        Raises:
            ValueError: the form grew too large to follow.
        """
        awaited, consumed = self._awaited, 0
        masks: list[np.ndarray | None] = [self._mask(awaited)]
        for draft in drafts:
            if draft in self._ends:
                break
            if awaited is not None:
                awaited = None if draft == awaited else awaited
            elif self._matcher.try_consume_tokens([draft]):
                consumed += 1
            else:
                break
            masks.append(self._mask(awaited))
        if consumed and not self._matcher.rollback(consumed):
            raise ValueError(self._error())
        return masks + [None] * (len(drafts) + 1 - len(masks))

    def advance(self, tokens: Sequence[int]) -> None:
        """Go on by sampled tokens; what follows an end token is not looked at.

        Raises:
            ValueError: a token that may not come, or the form grew too large to follow.
        """
        for token in tokens:
            if self._ended:
                return
            if self._awaited is not None:
                self._ended = token in self._ends
                self._awaited = None if token == self._awaited else self._awaited
            elif not self._matcher.consume_token(int(token)):
                raise ValueError(self._error())
            else:
                self._ended = token in self._ends

    def _mask(self, awaited: int | None) -> np.ndarray:
        if awaited is not None:
            return self._reasoning_mask
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(self._error())
        return mask

    def _error(self) -> str:
        return f"structured: the {self._kind} cannot be followed: {_reason(self._matcher.get_error())}"


def open_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> int | None:
    """The token that will end the output's reasoning part; None where the prompt leaves none open, or the tokenizer has
    no such tokens."""
    if not set(REASONING_MARKS) <= set(tokenizer.control_tokens):
        return None
    begin, end = map(tokenizer.token_id, REASONING_MARKS)
    last = next((token for token in reversed(prompt_ids) if token in (begin, end)), end)
    return end if last == begin else None


def _without_control_tokens(tokenizer_json: str) -> str:
    """Where a form leaves one text alone, llguidance lets only that text's tokens come; knowing control tokens by name,
    it would take a text that spells one for the token, which has no text.  Grammars name them by number."""
    content = json.loads(tokenizer_json)
    content["added_tokens"] = [each for each in content["added_tokens"] if not _is_control(each)]
    return json.dumps(content)


def _is_control(added: Mapping[str, Any]) -> bool:
    """By llguidance's own measure."""
    text = added["content"]
    return bool(added["special"]) or (text.startswith("<") and text.endswith(">"))


def _grammar(form: StructuredOutput) -> str:
    """The form in llguidance's own language."""
    from llguidance import LLMatcher

    if form.kind == "json_schema":
        try:
            return LLMatcher.grammar_from_json_schema(json.dumps(_schema(form.value)))
        except (RecursionError, TypeError) as error:  # nested too deeply, or holds what is not JSON
            raise ValueError(f"structured.value: the JSON schema is not JSON ({error})") from error
    if form.kind == "choice":
        return _choices(form.value)
    if not isinstance(form.value, str):
        raise ValueError(f"structured.value: a {form.kind} is text, not {type(form.value).__name__}")
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.value)
    return LLMatcher.grammar_from_lark(form.value)


def _schema(value: Any) -> Mapping[str, Any] | bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"structured.value: not JSON ({error}); give a schema as a mapping or as text") from error
    if not isinstance(value, (Mapping, bool)):
        raise ValueError(f"structured.value: a JSON schema is an object, not {type(value).__name__}")
    reference = endless_reference(value)
    if reference is not None:
        raise ValueError(
            f"structured: the json_schema cannot be met: {reference!r} requires itself again without an end; make what "
            "leads back to it optional"
        )
    return value


def _choices(value: Any) -> str:
    from llguidance import LLMatcher

    texts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"structured.value: choices {texts!r} must be texts of at least one character")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts))


def _reason(message: str) -> str:
    """Of llguidance's message, which goes on with the state of its parser."""
    lines = message.strip().splitlines() or ["no reason given"]
    parts = [lines[0], *(line for line in lines[1:] if line.startswith("error:"))]
    return " ".join(part if len(part) <= MOST_REASON else f"{part[:MOST_REASON]} ..." for part in parts)
