"""Random ways to cut a tensor into rectangles, for tests of resharding."""

from __future__ import annotations

from hypothesis import strategies as st

from abyssal.checkpoint.rectangles import Rectangle

shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def rectangles(draw: st.DrawFn, shape: tuple[int, ...]) -> Rectangle:
    """One within a tensor of ``shape``, with at least one element."""
    cuts = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in shape]
    return Rectangle(tuple(begin for begin, _ in cuts), tuple(end - begin for begin, end in cuts))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], most: int = 8) -> list[Rectangle]:
    """Rectangles that cover it once, in any order: one is cut in two, along any axis, again and again."""
    tiles = [Rectangle.whole(shape)]
    for _ in range(draw(st.integers(0, most - 1))):
        tile = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        axes = [axis for axis, size in enumerate(tile.sizes) if size > 1]
        if not axes:
            tiles.append(tile)
            continue
        axis = draw(st.sampled_from(axes))
        first = draw(st.integers(1, tile.sizes[axis] - 1))
        tiles += [
            Rectangle(tile.offsets, _with(tile.sizes, axis, first)),
            Rectangle(
                _with(tile.offsets, axis, tile.offsets[axis] + first),
                _with(tile.sizes, axis, tile.sizes[axis] - first),
            ),
        ]
    return draw(st.permutations(tiles))


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
