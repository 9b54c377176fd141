"""A timeline as lines of text, one a rank, cut into bands where it is longer than a line.

A work is its letter and its micro-batch, or the letter alone where there is no room; small letters are of the rank's
second chunk.  A pair is both with a plus between.  A dot is a rank that waits.

    rank 0  F0F1f2....B0--F3+b2    with room
    rank 0  FFf..B-F+b             without
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from abyssal.parallel.pipeline.schedule_record import Action, Kind, Work
from abyssal.parallel.pipeline.simulate import Span, Timeline

_MOST_BANDS = 8
"""A longer timeline is drawn smaller."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of characters of one look; of no kind where the rank waits."""

    text: str
    kind: Kind | None = None
    chunk: int = 0


@dataclass(frozen=True)
class Band:
    """A stretch of time: a line of pieces for each rank."""

    start: float
    end: float
    rows: tuple[tuple[Piece, ...], ...]


def bands(timeline: Timeline, width: int) -> list[Band]:
    """The timeline in lines of at most ``width`` characters."""
    scale, full = _scale(timeline, width)
    lines = [_line(spans, scale, full) for spans in timeline.spans]
    length = max(1, max(map(_length, lines)))
    lines = [[*line, Piece("." * (length - _length(line)))] for line in lines]
    made = []
    for begin in range(0, length, width):
        end = min(begin + width, length)
        rows = tuple(tuple(_cut(line, begin, end)) for line in lines)
        made.append(Band(begin / scale, timeline.makespan if end == length else end / scale, rows))
    return made


def _scale(timeline: Timeline, width: int) -> tuple[float, bool]:
    """Characters a unit of time, and whether all names have room: they do if that fits a line; else letters in as
    few bands as they need, and smaller than a letter each in the most bands that there may be."""
    spans = [span for spans in timeline.spans for span in spans if span.end > span.start]
    named = max(len(_name(span.action, full=True)) / (span.end - span.start) for span in spans)
    if math.ceil(timeline.makespan * named) <= width:
        return named, True
    lettered = max(len(span.action.works) / (span.end - span.start) for span in spans)
    return min(lettered, _MOST_BANDS * width / timeline.makespan), False


def _line(spans: tuple[Span, ...], scale: float, full: bool) -> list[Piece]:
    pieces, column = [], 0
    for span in spans:
        start, end = _column(span.start, scale), _column(span.end, scale)
        if start > column:
            pieces.append(Piece("." * (start - column)))
        pieces += _block(span.action, end - start, full)
        column = end
    return pieces


def _column(time: float, scale: float) -> int:
    return math.floor(time * scale + 0.5 - 1e-9)


def _block(action: Action, width: int, full: bool) -> list[Piece]:
    """An action as ``width`` characters; where rounding leaves no room for a pair, its forward stands for both."""
    if not width:
        return []
    first, *others = action.works
    left = _label(first, full)
    if not others or len(_name(action, full)) > width:
        return [Piece(left.ljust(width, "-")[:width], first.kind, first.chunk)]
    (second,) = others
    left += "+"
    right = _label(second, full).ljust(width - len(left), "-")
    return [Piece(left, first.kind, first.chunk), Piece(right, second.kind, second.chunk)]


def _name(action: Action, full: bool) -> str:
    return "+".join(_label(work, full) for work in action.works)


def _label(work: Work, full: bool) -> str:
    letter = work.kind.lower() if work.chunk else work.kind
    return f"{letter}{work.micro_batch}" if full else letter


def _length(line: list[Piece]) -> int:
    return sum(len(piece.text) for piece in line)


def _cut(line: list[Piece], begin: int, end: int) -> list[Piece]:
    """The characters of a line from ``begin`` to ``end``."""
    cut, column = [], 0
    for piece in line:
        text = piece.text[max(0, begin - column) : max(0, end - column)]
        column += len(piece.text)
        if text:
            cut.append(Piece(text, piece.kind, piece.chunk))
    return cut
