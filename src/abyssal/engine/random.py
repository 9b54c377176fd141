"""Random numbers by (seed, position, purpose): a token's draw depends on nothing else.

A generator with a state would tie a request's tokens to how often it was asked: batching, preemption, speculation and
a resumed request would all change them.  Here the numbers are a function of where they are used
(:mod:`abyssal.kernels.counter_random`).

Legend: T rows, V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from abyssal.kernels import counter_random

_SEED_BITS = (1 << 64) - 1


class Purpose(IntEnum):
    """What a number is for; numbers for different purposes at one position are independent."""

    SAMPLE = 0
    """Choosing the token at a position."""
    DRAFT = 1
    """Drafting it."""
    ACCEPT = 2
    """Accepting the draft."""
    REPLACE = 3
    """Choosing another token in place of a rejected draft."""
    FORK = 4
    """Seeds of a request's further completions."""


def fresh_seed() -> int:
    """A seed from the operating system, for a request without one: 0 .. 2^63 - 1."""
    return secrets.randbits(63)


def fork_seed(seed: int, index: int) -> int:
    """Seed of a request's completion number ``index``; the first one's is the request's own."""
    if index == 0:
        return seed
    return int(counter_random.row_words(seed_words([seed]), np.array([index]), Purpose.FORK)[0, 0])


def seed_words(seeds: Sequence[int]) -> np.ndarray:
    """Seeds as uint64 (T,): whole numbers of any sign, modulo 2^64."""
    return np.fromiter((seed & _SEED_BITS for seed in seeds), np.uint64, len(seeds))


def uniforms(seeds: Sequence[int], positions: Sequence[int], purpose: Purpose) -> np.ndarray:
    """One number a row in [0, 1), FP64 (T,), in steps of 2^-53."""
    bits_T = counter_random.row_words(seed_words(seeds), np.asarray(positions), purpose)[:, 0]
    return (bits_T >> np.uint64(11)).astype(np.float64) * 2.0**-53


def exponentials(seeds: Sequence[int], positions: Sequence[int], purpose: Purpose, vocab_size: int) -> np.ndarray:
    """Exponentially distributed numbers, FP64 (T, V), larger than 0: one for each row and token."""
    return counter_random.exponentials(_starts(seeds, positions, purpose), vocab_size)


def exponentials_at(
    seeds: Sequence[int], positions: Sequence[int], purpose: Purpose, rows_N: np.ndarray, tokens_N: np.ndarray
) -> np.ndarray:
    """The numbers of :func:`exponentials` at (row, token) pairs alone, FP64 (N,)."""
    return counter_random.exponentials_at(_starts(seeds, positions, purpose)[rows_N], tokens_N)


def _starts(seeds: Sequence[int], positions: Sequence[int], purpose: Purpose) -> np.ndarray:
    return counter_random.row_words(seed_words(seeds), np.asarray(positions), purpose)[:, 1]
