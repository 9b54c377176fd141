"""Rectangles of a tensor: whether they cover it exactly once, and where two of them meet.  Free of torch.

A save on one mesh and a load on another cut the same tensor differently.  Both are sets of rectangles, and everything
that resharding needs is here: :func:`first_fault` finds what is missing or there twice, :func:`overlap` what a saved
and a wanted rectangle have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of a tensor: where it begins and how far it reaches, by axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rectangle:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    def within(self, outer: Rectangle) -> tuple[slice, ...]:
        """Where it lies in a tensor that holds ``outer``."""
        begins = [offset - begin for offset, begin in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.sizes, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{one}:{end}" for one, end in zip(self.offsets, self.ends, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class Fault:
    """A part of a tensor that is not in exactly one rectangle."""

    part: Rectangle
    owners: tuple[int, ...]
    """Indices of the rectangles that hold it; none: it is missing."""


def overlap(one: Rectangle, other: Rectangle) -> Rectangle | None:
    """What both hold; None where that is nothing."""
    begins = tuple(map(max, one.offsets, other.offsets))
    ends = tuple(map(min, one.ends, other.ends))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return Rectangle(begins, sizes) if all(size > 0 for size in sizes) else None


def first_fault(outer: Rectangle, rectangles: Sequence[Rectangle]) -> Fault | None:
    """The first part of ``outer`` that is not in exactly one of ``rectangles``, which lie within it; None: all are.

    Sweeps along the first axis: between two neighbouring borders the same rectangles are there, and what they hold of
    the other axes is the same question with one axis less.
    """
    if not outer.num_elements:
        return None
    filled = [(index, rectangle) for index, rectangle in enumerate(rectangles) if rectangle.num_elements]
    return _fault(outer, 0, filled)


def _fault(outer: Rectangle, axis: int, held: Sequence[tuple[int, Rectangle]]) -> Fault | None:
    if axis == len(outer.sizes):
        return None if len(held) == 1 else Fault(outer, tuple(index for index, _ in held))
    waiting = sorted(held, key=lambda one: one[1].offsets[axis], reverse=True)
    here: list[tuple[int, Rectangle]] = []
    borders = {outer.offsets[axis], outer.ends[axis]}
    borders |= {border for _, one in held for border in (one.offsets[axis], one.ends[axis])}
    begin, *ends = sorted(borders)
    for end in ends:
        here = [one for one in here if one[1].ends[axis] > begin]
        while waiting and waiting[-1][1].offsets[axis] <= begin:
            here.append(waiting.pop())
        slab = Rectangle(
            (*outer.offsets[:axis], begin, *outer.offsets[axis + 1 :]),
            (*outer.sizes[:axis], end - begin, *outer.sizes[axis + 1 :]),
        )
        fault = _fault(slab, axis + 1, here)
        if fault is not None:
            return fault
        begin = end
    return None
