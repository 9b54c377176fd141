"""The choice of a chunk's size, without ranks: which sizes are tried, and which of those measured is taken."""

from __future__ import annotations

import pytest

from abyssal.parallel.dispatch.tune import candidates, choose, worth_measuring


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(0, [1]), (1, [1]), (63, [63]), (127, [127, 64]), (128, [128, 64]), (4096, [4096, 2048, 1024, 512])],
)
def test_sizes_from_whole_to_small_but_none_too_small_to_be_worth_a_message(tokens: int, sizes: list[int]) -> None:
    assert candidates(tokens) == sizes and worth_measuring(tokens) == (len(sizes) > 1)


def test_the_fastest_is_taken_but_smaller_chunks_must_be_worth_it() -> None:
    assert choose({512: 1.0, 256: 0.5, 128: 0.6}).tokens == 256
    assert choose({512: 1.0, 256: 0.98, 128: 1.2}).tokens == 512
    assert choose({512: 3.0, 256: 2.0, 128: 1.0}).seconds == {512: 3.0, 256: 2.0, 128: 1.0}
