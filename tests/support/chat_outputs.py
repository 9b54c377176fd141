"""Outputs of models: pieces to make good and bad ones of, and a second way to read a whole one."""

from __future__ import annotations

import re
from collections.abc import Collection

from abyssal.text.output_delta import ParsedOutput, ToolCall

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"
NAMES = ("get", "get_time", "function")

PIECES = (
    *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP, "function", "get", "get_time", "get_t", "add"),
    *("\n```json\n", "```json", "\n```", "```", "\n```\n", "\n", "\n\n", " ", " " * 9),
    *("{", "}", '{"a": "x"}', '{"é": [1, "🙂"]}', "{}"),
    *("<think>", "</think>", "\n</think>", "<think>\n", "</"),
    *("<", "<｜", "<｜tool▁call", "<｜tool▁calls▁", "｜>", "text", "é🙂"),
)


def v3_call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31_call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}{name}{SEP}{arguments}{CALL_END}"


def read_whole(text: str, fenced: bool, names: Collection[str], open_think: bool, newlines: bool) -> ParsedOutput:
    """A whole output, read with regular expressions; ids are numbers.

    Args:
        fenced: V3's form of calls; V3.1's otherwise.
        open_think: the prompt ended with ``<think>`` (and its line end).
        newlines: R1's line ends around ``</think>``.
    """
    reasoning = ""
    if open_think:
        reasoning, closed, text = text.partition("</think>")
        if newlines and closed:
            reasoning = reasoning.removesuffix("\n")
            text = re.sub(r"\A\n{1,2}", "", text)
    content: list[str] = []
    calls: list[ToolCall] = []
    place = 0
    behind_call = False
    while True:
        if behind_call and (ended := re.compile(rf"{_SPACE}{CALLS_END}").match(text, place)):
            place, behind_call = ended.end(), False
        header = _header(fenced, names)
        here = re.compile(_SPACE + header).match(text, place) if behind_call else None
        found = here or re.compile(header).search(text, place)
        if found is None:
            content.append(text[place:])
            break
        if here is None:
            content.append(text[place : found.start()])
        name = found["name"]
        rest = text[found.end() :]
        marker = re.search("|".join((CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END)), rest)
        arguments = rest if marker is None else rest[: marker.start()]
        if marker is not None and fenced:
            arguments = re.sub(r"(?s)\A(.*?)\n?```\n?\Z", r"\1", arguments)
        calls.append(ToolCall(str(len(calls)), name, arguments, marker is not None))
        if marker is None:
            break
        ended_by = marker[0]
        place = found.end() + (marker.end() if ended_by in (CALL_END, CALLS_END) else marker.start())
        behind_call = ended_by != CALLS_END
    return ParsedOutput(reasoning, "".join(content), tuple(calls))


_SPACE = r"[ \t\r\n]{0,8}"


def _header(fenced: bool, names: Collection[str]) -> str:
    name = "(?P<name>" + "|".join(map(re.escape, names)) + r")(?![\w.:/-])"
    pieces = [CALL_BEGIN, "function", SEP, name, "```json"] if fenced else [CALL_BEGIN, name, SEP]
    return f"(?:{CALLS_BEGIN}{_SPACE})?" + _SPACE.join(pieces) + _SPACE + r"(?=\{)"
