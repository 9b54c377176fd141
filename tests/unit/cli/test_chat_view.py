"""How an answer is shown while it grows: reasoning told from answer, on a terminal and in a pipe."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from abyssal.cli.chat_view import AnswerParts, PipeView, TerminalView
from abyssal.cli.terminal import visible
from abyssal.engine.messages import CompletionOutput, SamplingParams
from abyssal.engine.stop import OutputText
from abyssal.text.tokenizer import Tokenizer, train_bpe

PLAIN = train_bpe(["a"], 262)
TOKENIZER = PLAIN.with_control_tokens(["<think>", "</think>"])
BEGIN, END = (TOKENIZER.token_id(mark) for mark in ("<think>", "</think>"))
HEARD = TOKENIZER.encode("2+2?")


def growing(ids: list[int], tokenizer: Tokenizer = TOKENIZER, stop: str = "") -> list[CompletionOutput]:
    """The output after each token."""
    text = OutputText(SamplingParams(stop=(stop,) if stop else ()), tokenizer.byte_strings(skip_control=True))
    outputs = []
    for number, token in enumerate(ids, 1):
        text.push([token])
        outputs.append(CompletionOutput(0, tuple(ids[:number]), text.text, None, 4))
    return outputs


def last_split(prompt: list[int], ids: list[int], **options) -> tuple[str, str]:
    parts = AnswerParts(options.get("tokenizer", TOKENIZER), prompt)
    return [parts.split(output) for output in growing(ids, **options)][-1]


THOUGHT, ANSWER = TOKENIZER.encode("\nis 4\n"), TOKENIZER.encode("\n\n4.")


def test_reasoning_ends_at_its_mark() -> None:
    whole = [*THOUGHT, END, *ANSWER]
    assert last_split([*HEARD, BEGIN], whole) == ("is 4", "4.")
    assert last_split([*HEARD, BEGIN], THOUGHT) == ("is 4", "")
    assert last_split(HEARD, [BEGIN, *whole]) == ("is 4", "4."), "opened by the model itself"
    assert last_split([*HEARD, BEGIN, END], TOKENIZER.encode("4.")) == ("", "4.")
    assert last_split(HEARD, TOKENIZER.encode("4.")) == ("", "4.")
    assert last_split(PLAIN.encode("x"), PLAIN.encode("4."), tokenizer=PLAIN) == ("", "4.")
    assert last_split([*HEARD, BEGIN], [*THOUGHT, END, *TOKENIZER.encode("4. 5")], stop=" 5") == ("is 4", "4.")


@given(st.text(st.sampled_from("aé東\n "), max_size=12), st.text(st.sampled_from("aé東\n "), max_size=12))
def test_what_was_shown_is_never_taken_back(thought: str, answer: str) -> None:
    parts = AnswerParts(TOKENIZER, [BEGIN])
    shown = [parts.split(each) for each in growing([*TOKENIZER.encode(thought), END, *TOKENIZER.encode(answer)])]
    for (thought_before, answer_before), (thought_after, answer_after) in pairwise(shown):
        assert thought_after.startswith(thought_before) and answer_after.startswith(answer_before)
    assert shown[-1] == (thought.strip("\n"), answer.lstrip("\n"))


STEPS = [("is", ""), ("is 4", ""), ("is 4", "4"), ("is 4", "4.")]


@pytest.mark.parametrize(("show", "expected"), [(False, "4.\n"), (True, "<think>\nis 4\n</think>\n4.\n")])
def test_a_pipe_gets_text_alone(show: bool, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    view = PipeView(show)
    for _ in range(2):
        view.begin()
        for step in STEPS:
            view.update(*step)
        view.end("cut off", "")
    assert capsys.readouterr() == (expected * 2, "")
    view.begin()
    view.update("is", "")
    view.end("", "7 tokens")
    assert capsys.readouterr() == ("<think>\nis\n</think>\n" if show else "\n", "7 tokens\n")


def test_a_terminal_dims_or_folds_the_reasoning() -> None:
    seen = {}
    for show in (True, False):
        console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
        view = TerminalView(console, show)
        view.begin()
        for step in STEPS:
            view.update(*step)
        view.end("stopped", "")
        seen[show] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2;3mis\x1b[0m\x1b[2;3m 4\x1b[0m\n\n4.\n" in seen[True] and "\x1b[2m[stopped]" in seen[True]
    assert (
        "is" not in seen[False].replace("[thought in 2 words]", "") and seen[False].count("[thought in 2 words]") == 1
    )
    assert "4." in seen[False]


def test_a_model_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b]0;title\x07\n\tb\x9b1m\r") == "a␛]0;title␇\n\tb�1m␍"
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    view = TerminalView(console, True)
    view.begin()
    view.update("", "[red]x\x1b[31m")
    view.end("", "")
    assert "[red]x␛[31m" in console.file.getvalue()  # type: ignore[attr-defined]
