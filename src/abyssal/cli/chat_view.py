"""How a chat looks: an answer as it grows, on a terminal or in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from abyssal.cli.terminal import visible
from abyssal.engine.messages import CompletionOutput
from abyssal.engine.structured import REASONING_MARKS, open_reasoning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from abyssal.text.tokenizer import Tokenizer


class AnswerParts:
    """Tells a growing output's reasoning from its answer.

    The output begins in its reasoning where the prompt has left ``<think>`` open or its own first token is that.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._marks = None
        if set(REASONING_MARKS) <= set(tokenizer.control_tokens):
            begin, end = map(tokenizer.token_id, REASONING_MARKS)
            self._marks = begin, end
        self._open = open_reasoning(tokenizer, prompt_ids) is not None
        self._ends: tuple[int, int] | None = None
        """Where in the text the reasoning ends and the answer begins, once that is known."""

    def split(self, output: CompletionOutput) -> tuple[str, str]:
        """Reasoning and answer so far."""
        text, ids = output.text, output.token_ids
        if self._marks is None or not (self._open or ids[:1] == self._marks[:1]):
            return "", text
        begin, end = self._marks
        if self._ends is None and end in ids:
            at = ids.index(end)
            self._ends = len(self._decode(ids[:at])), len(self._decode(ids[: at + 1]))
        stop, start = self._ends or (len(text), len(text))
        opening = len(self._decode(ids[:1])) if ids[:1] == (begin,) else 0
        return text[opening:stop].strip("\n"), text[start:].lstrip("\n")

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_control=True)


class PipeView:
    """Text and nothing else: an answer, and a line end behind it."""

    def __init__(self, show_reasoning: bool) -> None:
        self._show_reasoning = show_reasoning
        self._reasoning = self._answer = ""

    def update(self, reasoning: str, answer: str) -> None:
        """The answer has come this far."""
        if self._show_reasoning:
            if reasoning and not self._reasoning:
                sys.stdout.write("<think>\n")
            sys.stdout.write(_more(self._reasoning, reasoning))
            if reasoning and answer and not self._answer:
                sys.stdout.write("\n</think>\n")
        sys.stdout.write(_more(self._answer, answer))
        sys.stdout.flush()
        self._reasoning, self._answer = reasoning, answer

    def end(self, note: str, figures: str) -> None:
        """It is whole, or not for the reason that ``note`` gives; ``figures`` say how fast it was, where asked for."""
        if self._show_reasoning and self._reasoning and not self._answer:
            sys.stdout.write("\n</think>")
        sys.stdout.write("\n")
        sys.stdout.flush()
        if figures:
            print(figures, file=sys.stderr)

    def begin(self) -> None:
        """The model reads what was asked."""
        self._reasoning = self._answer = ""

    def settle(self) -> None:
        """There will be no more of it: something went wrong."""

    def say(self, text: str) -> None:
        """What a command did."""
        print(text, file=sys.stderr)


class TerminalView:
    """The reasoning dimmed, or folded into a count of its words; the answer plain."""

    def __init__(self, console: Console, show_reasoning: bool) -> None:
        self._console = console
        self._show_reasoning = show_reasoning
        self._reasoning = self._answer = ""
        self._status: Status | None = None

    def begin(self) -> None:
        self._reasoning = self._answer = ""
        self._spin("reading")

    def update(self, reasoning: str, answer: str) -> None:
        if reasoning and not answer and not self._show_reasoning:
            self._spin(f"thinking, {len(reasoning.split())} words")
        elif reasoning or answer:
            self.settle()
            self._show(reasoning, answer)
        self._reasoning, self._answer = reasoning, answer

    def end(self, note: str, figures: str) -> None:
        self.settle()
        if self._reasoning and not self._answer and not self._show_reasoning:
            self._fold(self._reasoning)
        elif self._answer or self._reasoning:
            self._console.print()
        for line in (note, figures):
            if line:
                self.say(f"[{line}]")
        self._console.print()

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def complain(self, text: str) -> None:
        """Something was wrong with what the user typed."""
        self._console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def _show(self, reasoning: str, answer: str) -> None:
        if self._show_reasoning:
            self._print(_more(self._reasoning, reasoning), "dim italic")
        if answer and not self._answer and reasoning:
            if self._show_reasoning:
                self._print("\n\n")
            else:
                self._fold(reasoning)
        self._print(_more(self._answer, answer))

    def _fold(self, reasoning: str) -> None:
        self.say(f"[thought in {len(reasoning.split())} words]")

    def _print(self, text: str, style: str | None = None) -> None:
        if text:
            self._console.print(visible(text), end="", style=style, markup=False, highlight=False, soft_wrap=True)

    def _spin(self, text: str) -> None:
        if self._status is None:
            self._status = self._console.status(text, spinner="dots")
            self._status.start()
        else:
            self._status.update(text)

    def settle(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _more(before: str, now: str) -> str:
    """What ``now`` adds."""
    return now[len(before) :]
