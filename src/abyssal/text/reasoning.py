"""Where a family's reasoning begins and ends, and whether a prompt leaves it open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from abyssal.text.scan import Tails
from abyssal.text.template_marks import THINK_TAGS
from abyssal.text.template_parts import Part

THINK_BEGIN, THINK_END = THINK_TAGS


@dataclass(frozen=True)
class ReasoningSyntax:
    """Line ends that the format, and not the model's thought, puts around the tags."""

    after_begin: int = 0
    before_end: int = 0
    after_end: int = 0

    @cached_property
    def tails(self) -> Tails:
        """What reasoning may end with and yet not be reasoning."""
        return Tails.of(["\n" * self.before_end + THINK_END, THINK_END])


R1_REASONING = ReasoningSyntax(1, 1, 2)
V31_REASONING = ReasoningSyntax()


class PromptEnd(Enum):
    """How a prompt leaves the model's reasoning."""

    OPEN = "open"
    """The output goes on with it."""
    CLOSED = "closed"
    """The prompt ended it, and an answer follows."""
    FREE = "free"
    """Neither: the output may begin with reasoning of its own, as behind a tool's result."""


def prompt_end(parts: Sequence[Part]) -> PromptEnd:
    """Of a rendered prompt.  Tags that somebody wrote do not count."""
    behind = ""
    for part in reversed(parts):
        if part.control:
            begin, end = part.text.rfind(THINK_BEGIN), part.text.rfind(THINK_END)
            if begin > end:
                return PromptEnd.OPEN
            if end >= 0:
                behind = part.text[end + len(THINK_END) :] + behind
                return PromptEnd.FREE if behind.strip() else PromptEnd.CLOSED
        behind = part.text + behind
    return PromptEnd.FREE


def text_behind_tag(parts: Sequence[Part]) -> bool:
    """Of an open prompt: whether anything stands behind its last ``<think>``."""
    return not parts[-1].text.endswith(THINK_BEGIN)
