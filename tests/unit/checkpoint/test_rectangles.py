"""Rectangles that tile a tensor are told from those that leave a part out or hold one twice, and the part is named."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from abyssal.checkpoint.rectangles import Fault, Rectangle, first_fault, overlap
from tests.support.tilings import rectangles, shapes, tilings


def _counts(shape: tuple[int, ...], held: list[Rectangle]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for one in held:
        counts[one.within(Rectangle.whole(shape))] += 1
    return counts


@given(st.data())
def test_a_tiling_has_no_fault(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    assert first_fault(Rectangle.whole(shape), data.draw(tilings(shape))) is None


@given(st.data())
def test_a_fault_is_found_where_counting_finds_one(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    held = data.draw(st.lists(rectangles(shape), max_size=5) | tilings(shape))
    if held and data.draw(st.booleans()):
        held = held[1:] if data.draw(st.booleans()) else [*held, data.draw(st.sampled_from(held))]
    whole = Rectangle.whole(shape)
    fault, counts = first_fault(whole, held), _counts(shape, held)
    assert (fault is None) == bool((counts == 1).all())
    if fault is not None:
        part = counts[fault.part.within(whole)]
        assert part.size and (part == len(fault.owners)).all() and len(fault.owners) != 1
        assert all(overlap(held[index], fault.part) == fault.part for index in fault.owners)


@given(st.data())
def test_an_overlap_is_what_both_hold(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    one, other = data.draw(rectangles(shape)), data.draw(rectangles(shape))
    both = _counts(shape, [one, other]) == 2
    found = overlap(one, other)
    assert found == overlap(other, one)
    expected = np.zeros(shape, dtype=bool)
    if found is not None:
        expected[found.within(Rectangle.whole(shape))] = True
    assert (both == expected).all()


def test_where_a_rectangle_lies_in_another() -> None:
    inner, outer = Rectangle((3, 10), (2, 5)), Rectangle((1, 10), (6, 8))
    assert inner.within(outer) == (slice(2, 4), slice(0, 5))
    assert (str(inner), inner.ends, inner.num_elements) == ("[3:5, 10:15]", (5, 15), 10)


def test_tensors_without_axes_and_without_elements() -> None:
    scalar, empty = Rectangle((), ()), Rectangle((0, 0), (0, 4))
    assert first_fault(scalar, [scalar]) is None and overlap(scalar, scalar) == scalar
    assert first_fault(scalar, []) == Fault(scalar, ())
    assert first_fault(scalar, [scalar, scalar]) == Fault(scalar, (0, 1))
    assert first_fault(empty, []) is None and overlap(empty, empty) is None
