"""Finds the commands that a Markdown page tells the reader to type.

A fenced block preceded by the line ``<!-- run -->`` is run by the tests; each ``abyssal ...`` line in it is a command.
A backslash at a line's end joins the next; a comment after ``  #`` is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARK = "<!-- run -->"
_FENCE = re.compile(r"^(?P<mark><!-- run -->\n+)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One ``abyssal ...`` command of a page."""

    text: str
    marked: bool
    """Whether its block is marked to be run."""


def commands(page: str) -> list[Command]:
    """Every ``abyssal`` command in the page's fenced blocks, in order.

    Raises:
        ValueError: a mark that no fenced block follows.
    """
    blocks = list(_FENCE.finditer(page))
    if page.count(MARK) != sum(block["mark"] is not None for block in blocks):
        raise ValueError(f"a {MARK} is not followed by a fenced block")
    found = []
    for block in blocks:
        for line in block["body"].replace("\\\n", " ").splitlines():
            text = re.sub(r"\s+#.*$", "", line.strip().removeprefix("$ "))
            if text == "abyssal" or text.startswith("abyssal "):
                found.append(Command(" ".join(text.split()), block["mark"] is not None))
    return found
