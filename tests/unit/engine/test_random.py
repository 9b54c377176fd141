"""Counter-based random numbers: the published vectors, the right distributions, and nothing but the counter counts."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.engine.random import Purpose, exponentials, exponentials_at, fork_seed, fresh_seed, uniforms
from abyssal.kernels.counter_random import philox

PI = "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"
ONES = "ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"
ZEROS = "0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123, philox4x32-10."""
    words = [
        [np.array([int(word, 16) for word in part.split()], np.uint64) for part in row] for row in (PI, ONES, ZEROS)
    ]
    counters, keys, expected = (np.stack(column) for column in zip(*words, strict=True))
    assert (philox(counters, keys) == expected).all()


def test_numbers_have_their_distributions() -> None:
    positions = range(20000)
    uniform = uniforms([7] * 20000, positions, Purpose.ACCEPT)
    assert uniform.min() >= 0.0 and uniform.max() < 1.0
    assert np.abs(np.histogram(uniform, 20, (0, 1))[0] - 1000).max() < 150  # five standard deviations of 31
    values = exponentials([7] * 400, range(400), Purpose.SAMPLE, 50)
    assert values.min() > 0.0
    assert np.mean(values) == pytest.approx(1.0, abs=0.035) and np.var(values) == pytest.approx(1.0, abs=0.1)
    correlations = np.corrcoef(values.T) - np.eye(50)
    assert np.abs(correlations).max() < 0.25  # five of 1 / sqrt(400)


def test_a_number_depends_on_its_own_counter_alone() -> None:
    vocab_size = 40000  # more than is made at once
    seeds, positions = [3, 3, 4], [1, 2, 1]
    together = exponentials(seeds, positions, Purpose.SAMPLE, vocab_size)
    for row in range(3):
        alone = exponentials(seeds[row : row + 1], positions[row : row + 1], Purpose.SAMPLE, vocab_size)
        assert (alone[0] == together[row]).all()
        assert (exponentials([seeds[row]], [positions[row]], Purpose.SAMPLE, 7)[0] == together[row, :7]).all()
    rows, tokens = np.array([2, 0, 2]), np.array([39999, 5, 0])
    assert (exponentials_at(seeds, positions, Purpose.SAMPLE, rows, tokens) == together[rows, tokens]).all()


def test_seed_position_and_purpose_all_count() -> None:
    rows = [(seed, position) for seed in (0, 1, 1 << 32, (1 << 64) - 1) for position in (0, 1, 70000)]
    seeds, positions = zip(*rows, strict=True)
    numbers = np.concatenate([uniforms(seeds, positions, purpose) for purpose in Purpose])
    assert len(np.unique(numbers)) == len(numbers)
    first = np.concatenate([exponentials(seeds, positions, purpose, 3).reshape(-1) for purpose in Purpose])
    assert len(np.unique(first)) == len(first)


def test_seeds_of_further_completions_differ() -> None:
    assert fork_seed(5, 0) == 5
    assert len({fork_seed(seed, index) for seed in (5, 6) for index in range(100)}) == 200
    assert 0 <= fresh_seed() < 1 << 63 and fresh_seed() != fresh_seed()
    assert uniforms([-1], [0], Purpose.SAMPLE) == uniforms([(1 << 64) - 1], [0], Purpose.SAMPLE)
