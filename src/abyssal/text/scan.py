"""Small steps of reading a text that is not all there yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

SPACE = " \t\r\n"
MOST_SPACE = 8
"""Characters of white space that are skipped in one place, so that no more need be held back."""


class Verdict(Enum):
    """On a text that is not the one looked for."""

    UNFINISHED = 1
    """It may become so."""
    WRONG = 2


@dataclass(frozen=True)
class Tails:
    """Ends of a text that are held back, since they may be the beginning of something."""

    texts: frozenset[str]
    firsts: frozenset[str]
    """Their first characters, few and rare in other text."""
    longest: int

    @classmethod
    def of(cls, wholes: Sequence[str]) -> Tails:
        """Every true beginning of each of the texts."""
        texts = frozenset(whole[:end] for whole in wholes for end in range(1, len(whole)))
        return cls(texts, frozenset(whole[0] for whole in wholes), max(map(len, wholes)) - 1)


def length_held(text: str, start: int, tails: Tails) -> int:
    """Length of the longest end of ``text[start:]`` that is a tail."""
    window = text[max(start, len(text) - tails.longest) :]
    begins = [begin for first in tails.firsts if (begin := window.find(first)) >= 0]
    if begins:
        for begin in range(min(begins), len(window)):
            if window[begin:] in tails.texts:
                return len(window) - begin
    return 0


def after_literal(text: str, start: int, literal: str) -> int | Verdict:
    """Where ``literal``, which begins at ``start``, ends."""
    if text.startswith(literal, start):
        return start + len(literal)
    return Verdict.UNFINISHED if literal.startswith(text[start : start + len(literal)]) else Verdict.WRONG


def skip_space(text: str, start: int) -> int:
    """The first place from ``start`` that holds no white space, but no further than :data:`MOST_SPACE`."""
    end = min(len(text), start + MOST_SPACE)
    while start < end and text[start] in SPACE:
        start += 1
    return start
