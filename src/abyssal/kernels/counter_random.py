"""Numbers that are a function of a counter: Philox4x32-10 for a row, SplitMix64 for each token of it.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps (seed; position, purpose) to
128 bits.  Where a number for each token of the vocabulary is needed, those bits start a SplitMix64 sequence (Steele,
Lea and Flood, OOPSLA 2014), which is indexed by token: five integer operations a token, where Philox takes forty.

NumPy rather than torch: integer arithmetic is exact on both, but NumPy's logarithm gives an element the same bits
wherever in an array it stands.  ``csrc/race.cpp`` computes the same integers.

Legend: T rows, V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

import numpy as np

_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_ROUNDS = 10
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_CHUNK = 1 << 14
"""Numbers made at once: what is between stays in a core's cache."""


def philox(counters_T4: np.ndarray, keys_T2: np.ndarray) -> np.ndarray:
    """Philox4x32-10: uint32 words (T, 4) of counters (T, 4) and keys (T, 2), 32-bit values in uint64 arrays."""
    evens_2T, odds_2T = counters_T4.T[0::2].astype(np.uint64), counters_T4.T[1::2].astype(np.uint64)
    keys_2T = keys_T2.T.astype(np.uint64)
    keys_N2T = (keys_2T + np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL) & _WORD
    for round_keys_2T in keys_N2T:
        products_2T = (evens_2T * _MULTIPLIERS)[::-1]
        evens_2T = (products_2T >> _HALF) ^ odds_2T ^ round_keys_2T
        odds_2T = products_2T & _WORD
    return np.stack([evens_2T[0], odds_2T[0], evens_2T[1], odds_2T[1]], axis=1)


def row_words(seeds_T: np.ndarray, positions_T: np.ndarray, purpose: int) -> np.ndarray:
    """(T, 2) words of 64 bits: the first for one number a row, the second to start a row's sequence."""
    counters_T4 = np.zeros((len(seeds_T), 4), np.uint64)
    counters_T4[:, 0] = positions_T
    counters_T4[:, 1] = purpose
    keys_T2 = np.stack([seeds_T & _WORD, seeds_T >> _HALF], axis=1)
    words_T4 = philox(counters_T4, keys_T2)
    return words_T4[:, 0::2] | words_T4[:, 1::2] << _HALF


def exponentials(starts_T: np.ndarray, vocab_size: int) -> np.ndarray:
    """Exponentially distributed numbers, FP64 (T, V), larger than 0: one for each row and token."""
    tokens_V = np.arange(1, vocab_size + 1, dtype=np.uint64) * _GOLDEN
    values_TV = np.empty((len(starts_T), vocab_size))
    rows = max(1, _CHUNK // vocab_size)
    scratch = np.empty((2, min(rows, len(starts_T)), min(vocab_size, _CHUNK)), np.uint64)
    for row in range(0, len(starts_T), rows):
        for token in range(0, vocab_size, _CHUNK):
            values = values_TV[row : row + rows, token : token + _CHUNK]
            states, spare = scratch[:, : values.shape[0], : values.shape[1]]
            np.add(starts_T[row : row + rows, None], tokens_V[token : token + _CHUNK], out=states)
            _exponential(states, spare, values)
    return values_TV


def exponentials_at(starts_N: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """The numbers of :func:`exponentials` for single tokens, FP64 (N,), each with its row's start."""
    states_N = starts_N + (tokens_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    values_N = np.empty(len(tokens_N))
    _exponential(states_N, np.empty_like(states_N), values_N)
    return values_N


def _exponential(states: np.ndarray, spare: np.ndarray, values: np.ndarray) -> None:
    """SplitMix64's output for each state, as -log(u) with u in (0, 1) in steps of 2^-52, into ``values``."""
    for shift, multiplier in _MIX:
        states ^= np.right_shift(states, shift, out=spare)
        states *= multiplier
    states ^= np.right_shift(states, np.uint64(31), out=spare)
    states >>= np.uint64(12)
    values[...] = states
    values += 0.5
    values *= 2.0**-52
    np.log(values, out=values)
    np.negative(values, out=values)
