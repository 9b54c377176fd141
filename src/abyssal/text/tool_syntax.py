"""How the families write calls, and what of a text is one.

DeepSeek's published forms, V2.5, V3 and R1 the first, V3.1 the second:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>
        \\n<｜tool▁call▁begin｜>...<｜tool▁calls▁end｜>
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>
        <｜tool▁call▁begin｜>...<｜tool▁calls▁end｜>

A call's *header* is everything up to the ``{`` that begins its arguments.  Names are those offered, so headers are a
finite language, and a text is told from one at its first wrong character: no backtracking, and no more held back than
the longest header.  Models vary what surrounds the markers, so a little white space may stand between the pieces of a
header, the section's own markers may be missing, and so may the fence after the arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from abyssal.text.scan import Tails, Verdict, after_literal, skip_space
from abyssal.text.tools import MOST_NAME, NAME_CHARACTERS

SECTION_BEGIN, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MARKERS = (SECTION_BEGIN, CALL_BEGIN, CALL_END, SECTION_END)
"""What begins and ends calls; each ends the arguments before it."""
TRIGGER = "<｜tool▁call"
"""What all of them begin with, and little else."""
TOOL_MARKS = (*MARKERS, SEPARATOR)


@dataclass(frozen=True)
class Header:
    """A header that was found."""

    end: int
    """Where the arguments begin."""
    name: str


class _Name:
    """The place of the name in a header."""


_NAME = _Name()
_Piece = str | _Name


@dataclass(frozen=True)
class ToolSyntax:
    """One form of calls."""

    kind: str
    """What stands before the separator, ``function``; empty where the name does."""
    fence: str
    """What opens the arguments; empty where the separator does."""
    close: str
    """Between the arguments and their end marker, as the family writes it."""
    closings: tuple[str, ...]
    """What may stand between the arguments and their end marker and is none of them, longest first."""
    between: str
    """Between two calls."""

    @cached_property
    def call_pieces(self) -> tuple[_Piece, ...]:
        """Of a header without the section's marker."""
        named = (self.kind, SEPARATOR, _NAME, self.fence) if self.kind else (_NAME, SEPARATOR)
        return (CALL_BEGIN, *named)

    @cached_property
    def content_tails(self) -> Tails:
        """What content may end with and yet not be content."""
        return Tails.of([TRIGGER])

    @cached_property
    def argument_tails(self) -> Tails:
        """What arguments may end with and yet not be arguments: beginnings of a closing and a marker."""
        return Tails.of([closing + marker for closing in ("", *self.closings) for marker in MARKERS])

    def opening(self, text: str, start: int, names: Collection[str]) -> Header | Verdict:
        """Whether a call begins at ``start``."""
        return _best(
            _header(text, start, (SECTION_BEGIN, *self.call_pieces), names),
            _header(text, start, self.call_pieces, names),
        )

    def following(self, text: str, start: int, names: Collection[str]) -> Header | Verdict | int:
        """What comes behind a call: another one, the end of the section (where that ends), or neither."""
        start = skip_space(text, start)
        ended = after_literal(text, start, SECTION_END)
        found = self.opening(text, start, names)
        return ended if found is Verdict.WRONG else found

    def end_of_arguments(self, text: str, start: int, marker: int) -> int:
        """Of arguments from ``start`` that end at a marker."""
        closing = next((closing for closing in self.closings if text.endswith(closing, start, marker)), "")
        return marker - len(closing)


V3_CALLS = ToolSyntax("function", "```json", "\n```", ("\n```\n", "\n```", "```\n", "```"), "\n")
V31_CALLS = ToolSyntax("", "", "", (), "")


def _header(text: str, start: int, pieces: Sequence[_Piece], names: Collection[str]) -> Header | Verdict:
    """Whether the pieces stand at ``start``, with white space between them, and behind them ``{``."""
    at, name = start, ""
    for index, piece in enumerate((*pieces, "{")):
        if index:
            at = skip_space(text, at)
        if isinstance(piece, _Name):
            name = _read_name(text, at)
            if at + len(name) == len(text) and any(known.startswith(name) for known in names):
                return Verdict.UNFINISHED
            if name not in names:
                return Verdict.WRONG
            at += len(name)
            continue
        found = after_literal(text, at, piece)
        if isinstance(found, Verdict):
            return found
        at = found
    return Header(at - len("{"), name)


def _best(first: Header | Verdict, second: Header | Verdict) -> Header | Verdict:
    if isinstance(first, Header) or second is Verdict.WRONG:
        return first
    return second


def _read_name(text: str, at: int) -> str:
    end = at
    while end < len(text) and end - at <= MOST_NAME and text[end] in NAME_CHARACTERS:
        end += 1
    return text[at:end]
