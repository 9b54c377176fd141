"""The page's modules that need no document: streams, Markdown, numbers, what is read out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.page_modules import evaluate

ENDS = ["\n", "\r\n", "\r"]


def random_stream(chance: random.Random) -> tuple[str, list[dict[str, str]]]:
    """A stream of events with every kind of line end, comments and fields that mean nothing; and what it says."""
    text, told = "", list[dict[str, str]]()
    for _ in range(chance.randrange(6)):
        end = chance.choice(ENDS)
        name = chance.choice(["", "sample", "snapshot"])
        lines = [chance.choice(["", "x", " y", "ä:b", "data: z", "[DONE]"]) for _ in range(chance.randrange(4))]
        fields = [f"data:{chance.choice([' ', '']) if not line.startswith(' ') else ' '}{line}" for line in lines]
        fields += [f"event: {name}"] if name else []
        fields += chance.choice([[], [": keep-alive"], ["id: 7", "retry"]])
        text += "".join(field + end for field in fields) + end
        if lines:
            told.append({"name": name or "message", "data": "\n".join(lines)})
    return text, told


def cut(chance: random.Random, text: str) -> list[str]:
    places = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def test_a_stream_cut_anywhere_says_the_same() -> None:
    chance = random.Random(5)
    cases = [random_stream(chance) for _ in range(400)]
    # A final CR may be half of a CRLF, so a stream is followed by a comment, as one that goes on is.
    pieces = [cut(chance, text + ": more") for text, _ in cases]
    parse = "value.map((pieces) => { const parser = new EventParser(); return pieces.flatMap((p) => parser.push(p)); })"
    assert evaluate("sse.js", "EventParser", parse, pieces) == [told for _, told in cases]


def markdown(*texts: str) -> list[Any]:
    return evaluate("markdown.js", "parse", "value.map((text) => parse(text))", texts)


def words(tree: Any) -> str:
    """All text of a tree, in order."""
    if isinstance(tree, list):
        return "".join(map(words, tree))
    if not isinstance(tree, dict):
        return ""
    own = tree["text"] if isinstance(tree.get("text"), str) else ""
    return own + "".join(words(tree.get(name)) for name in ("inline", "blocks", "items", "head", "rows"))


def links(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for each in tree:
            yield from links(each)
    elif isinstance(tree, dict):
        if tree.get("kind") == "link":
            yield tree["url"]
        for each in tree.values():
            yield from links(each)


def text(value: str) -> dict[str, str]:
    return {"kind": "text", "text": value}


CASES: list[tuple[str, list[Any]]] = [
    ("plain", [{"kind": "paragraph", "inline": [text("plain")]}]),
    (
        "a **b** *c* `d*` ~~e~~",
        [
            {
                "kind": "paragraph",
                "inline": [
                    text("a "),
                    {"kind": "strong", "inline": [text("b")]},
                    text(" "),
                    {"kind": "em", "inline": [text("c")]},
                    text(" "),
                    {"kind": "code", "text": "d*"},
                    text(" "),
                    {"kind": "struck", "inline": [text("e")]},
                ],
            }
        ],
    ),
    # What is still being written is text until its partner comes.
    ("so **far", [{"kind": "paragraph", "inline": [text("so **far")]}]),
    ("2 * 3 * 4 and snake_case_name", [{"kind": "paragraph", "inline": [text("2 * 3 * 4 and snake_case_name")]}]),
    ("## Title ##", [{"kind": "heading", "level": 2, "inline": [text("Title")]}]),
    ("# C#", [{"kind": "heading", "level": 1, "inline": [text("C#")]}]),
    ("```py\na = 1\n\n# b\n```\n", [{"kind": "code", "language": "py", "text": "a = 1\n\n# b", "open": False}]),
    ("```\nnot closed", [{"kind": "code", "language": "", "text": "not closed", "open": True}]),
    ("````\n```\n````", [{"kind": "code", "language": "", "text": "```", "open": False}]),
    (
        "1. one\n2. two\n   - inner\n",
        [
            {
                "kind": "list",
                "ordered": True,
                "start": 1,
                "items": [
                    [{"kind": "paragraph", "inline": [text("one")]}],
                    [
                        {"kind": "paragraph", "inline": [text("two")]},
                        {
                            "kind": "list",
                            "ordered": False,
                            "start": 1,
                            "items": [[{"kind": "paragraph", "inline": [text("inner")]}]],
                        },
                    ],
                ],
            }
        ],
    ),
    (
        "> a\n> b",
        [{"kind": "quote", "blocks": [{"kind": "paragraph", "inline": [text("a"), {"kind": "break"}, text("b")]}]}],
    ),
    ("---", [{"kind": "rule"}]),
    (
        "| a | b |\n|---|--:|\n| 1 | 2 \\| 3 |",
        [
            {
                "kind": "table",
                "aligns": ["left", "right"],
                "head": [[text("a")], [text("b")]],
                "rows": [[[text("1")], [text("2 | 3")]]],
            }
        ],
    ),
    ("<b>hi</b> &amp;", [{"kind": "paragraph", "inline": [text("<b>hi</b> &amp;")]}]),
    (
        "[x](https://a.example/b) https://c.example/d.",
        [
            {
                "kind": "paragraph",
                "inline": [
                    {"kind": "link", "url": "https://a.example/b", "inline": [text("x")]},
                    text(" "),
                    {"kind": "link", "url": "https://c.example/d", "inline": [text("https://c.example/d")]},
                    text("."),
                ],
            }
        ],
    ),
]


def test_markdown_is_read_as_it_is_meant() -> None:
    for (source, wanted), found in zip(CASES, markdown(*(source for source, _ in CASES)), strict=True):
        assert found == wanted, source


def test_marks_that_wait_for_their_partner_are_closed_meanwhile() -> None:
    texts = {
        "so **far": "so **far**",
        "so **far ": "so **far**",
        "so **": "so ",
        "a `b**": "a `b**`",
        "**a** b": "**a** b",
        "**a\n\nb": "**a\n\nb",
        "```\na **b": "```\na **b",
        "x\n\n```\n1\n```\n\nthe `end": "x\n\n```\n1\n```\n\nthe `end`",
    }
    assert evaluate("markdown.js", "closed", "value.map(closed)", list(texts)) == list(texts.values())


PIECES = [
    "*",
    "**",
    "_",
    "`",
    "```",
    "~~~",
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "> ",
    "| ",
    "|--|",
    "# ",
    "[x](",
    ")",
    "  ",
    "\\",
]
WORDS = ["ab", "cd", "ef", "javascript:alert(1)", "http://x.y/z", "<script>", "é", "深"]


def test_no_text_is_lost_and_no_link_leads_into_the_page() -> None:
    """Of random texts, and of every text so far of one that is being written."""
    chance = random.Random(3)
    texts = ["".join(chance.choices(PIECES + WORDS, k=chance.randrange(30))) for _ in range(600)]
    growing = "# Hi\n\n1. **a** `b`\n2. c\n\n```py\nx = 1\n```\n| a | b |\n|---|---|\n| 1 | 2 |\n> q"
    texts += [growing[:end] for end in range(len(growing))]
    for source, tree in zip(texts, markdown(*texts), strict=True):
        assert all(re.match("https?://|mailto:", url) for url in links(tree))
        told = words(tree)
        for word in ("ab", "cd", "ef", "深"):
            # A fence's language and a table's ragged cells may go; letters of a plain text never.
            if not re.search(r"```|~~~|\|", source):
                assert told.count(word) == source.count(word), source


STICKY = [
    "*",
    "**a ",
    "_a",
    "`a``b",
    "[",
    "[a](",
    "> ",
    "- ",
    "  - a\n",
    "#",
    "| ",
    "|-",
    "\\",
    "https://",
    "``` ",
    "\n",
]


@pytest.mark.parametrize("source", [*STICKY, "# " + " " * 50])
def test_no_text_holds_the_page_up(source: str) -> None:
    """100,000 characters of whatever a model may get stuck in."""
    long = source * (100_000 // len(source))
    took = "(() => { const at = performance.now(); parse(value); return performance.now() - at; })()"
    assert evaluate("markdown.js", "parse", took, long) < 3000


def test_numbers_are_short() -> None:
    told = "value.map((x) => [short(x), percent(x), seconds(x), duration(x)])"
    found = evaluate(
        "numbers.js", "short, percent, seconds, duration", told, [0, 0.034, 0.5, 12.34, 999.9, 1234567, 86400]
    )
    assert [[one.replace("\u00a0", " ") for one in row] for row in found] == [
        ["0", "0 %", "0 ms", "0 s"],
        ["0.03", "3.4 %", "34 ms", "0 s"],
        ["0.5", "50 %", "500 ms", "0 s"],
        ["12", "1234 %", "12 s", "12 s"],
        ["1k", "99990 %", "1000 s", "16 min"],
        ["1.23M", "123456700 %", "1234567 s", "14 d 6 h"],
        ["86.4k", "8640000 %", "86400 s", "1 d 0 h"],
    ]


def test_money_shows_small_amounts() -> None:
    amounts = {
        0: "0.00 USD",
        1_230_000_000: "1.23 USD",
        4_560_000: "0.0046 USD",
        17: "0.000000017 USD",
        12_345_678_900_000: "12,345.68 USD",
    }
    found = evaluate("numbers.js", "money", "value.map((x) => money(x, 'USD'))", list(amounts))
    assert found == list(amounts.values())


def test_axes_have_round_steps_that_reach_the_top() -> None:
    highs = [0.001, 0.37, 1, 7, 99, 100, 12345]
    for high, steps in zip(highs, evaluate("numbers.js", "ticks", "value.map((x) => ticks(x, 3))", highs), strict=True):
        assert steps[0] == 0 and steps[-1] >= high * 0.999 and 2 <= len(steps) <= 5
        assert steps == sorted(set(steps))


def test_sentences_are_read_whole() -> None:
    texts = ["", "One. Two", "Pi is 3.14 or so", "Line\nnext", "好。 不"]
    assert evaluate("announcer.js", "lastSentence", "value.map(lastSentence)", texts) == [0, 4, 0, 5, 2]
