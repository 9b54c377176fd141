"""A race between tokens, of which the first to arrive is drawn: who may win, and how much stands before a token.

Token v arrives at E_v / w_v, E_v exponential by a counter (:mod:`~abyssal.kernels.counter_random`) and
w_v = exp((logit_v - largest) / temperature).  The definition takes an exponential and a logarithm in FP64 for each
token: milliseconds a row of 129K (``benchmarks/draws.py``).  But who arrives after the likeliest token cannot win,
whatever top-p and min-p cut off, since they never cut off the likeliest; and a comparison in FP32 tells nearly all of
those.  The few others are left to the caller, who looks at them by the definition, so that the token drawn is the
definition's, bit for bit.

Error bound: :func:`contenders` misses nobody who arrives before the likeliest; :func:`masses` are within
:data:`MASS_ERROR` of the whole mass.

Legend: T rows, V vocabulary, M places for the contenders of a row.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from abyssal.kernels.counter_random import exponentials, row_words
from abyssal.kernels.native import OK, native_library, openmp_fork

MASS_ERROR = 1e-4
TEMPERATURES = (1e-3, 1e3)
"""Between which FP32 does for the comparison."""

_pack_race = struct.Struct("=16q").pack  # the record `Arguments` of csrc/race.cpp
_pack_mass = struct.Struct("=6qd").pack  # the record `MassArguments`


@dataclass(frozen=True)
class Contenders:
    """Who may win, by row."""

    counts_T: np.ndarray
    """How many; -1 where they are more than there are places."""
    ids_TM: np.ndarray
    """Their ids, ascending, as many as the count says."""
    starts_T: np.ndarray
    """Of the rows' sequences of random numbers, uint64."""


def reference(
    logits_TV: np.ndarray,
    best_T: np.ndarray,
    temperatures_T: np.ndarray,
    seeds_T: np.ndarray,
    positions_T: np.ndarray,
    purpose: int,
) -> list[np.ndarray]:
    """Of each row, who does not arrive after its likeliest token: those that :func:`contenders` must hold."""
    starts_T = row_words(seeds_T, positions_T, purpose)[:, 1]
    rows_T = np.arange(len(logits_TV))
    wide_TV = logits_TV.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        weights_TV = np.exp((wide_TV - wide_TV[rows_T, best_T][:, None]) / temperatures_T[:, None])
        times_TV = exponentials(starts_T, logits_TV.shape[1]) / weights_TV
    return [np.flatnonzero(times_V <= times_V[best]) for times_V, best in zip(times_TV, best_T, strict=True)]


def contenders(
    logits_TV: np.ndarray,
    best_T: np.ndarray,
    temperatures_T: np.ndarray,
    seeds_T: np.ndarray,
    positions_T: np.ndarray,
    purpose: int,
    most: int,
    *,
    isa_limit: int = -1,
) -> Contenders | None:
    """Who may win, found by the C++ of ``csrc/race.cpp``; None where it does not apply.

    Args:
        logits_TV: FP32, contiguous, each row's largest finite.
        best_T: int64, each row's likeliest token.
        temperatures_T: FP64, within :data:`TEMPERATURES`.
        seeds_T, positions_T, purpose: uint64, int64 below 2^32, and below 2^32: what the numbers depend on.
        most: places for a row's contenders.
        isa_limit: the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library = native_library()
    if library is None or logits_TV.dtype != np.float32 or not logits_TV.flags.c_contiguous:
        return None
    rows, vocab_size = logits_TV.shape
    inputs = (
        np.ascontiguousarray(best_T, np.int64),
        np.ascontiguousarray(temperatures_T, np.float64),
        np.ascontiguousarray(seeds_T, np.uint64),
        np.ascontiguousarray(positions_T, np.int64),
    )
    starts_T, counts_T, ids_TM = np.empty(rows, np.uint64), np.empty(rows, np.int64), np.empty((rows, most), np.int64)
    pointers = [array.ctypes.data for array in (logits_TV, *inputs, starts_T, counts_T, ids_TM)]
    sizes = rows, vocab_size, most, purpose, torch.get_num_threads(), openmp_fork(), isa_limit
    if library.abyssal_race(_pack_race(*pointers, *sizes, 0)) != OK:
        return None
    return Contenders(counts_T, ids_TM, starts_T)


def masses(
    logits_V: np.ndarray, token: int, best: int, temperature: float, *, isa_limit: int = -1
) -> tuple[float, float] | None:
    """The mass of the tokens before one (likelier, or as likely with a smaller id) and of all, the likeliest's being 1;
    None where the C++ of ``csrc/race.cpp`` does not apply.  Arguments as for :func:`contenders`.
    """
    library = native_library()
    if library is None or logits_V.dtype != np.float32 or not logits_V.flags.c_contiguous:
        return None
    found = np.empty(2)
    record = _pack_mass(logits_V.ctypes.data, found.ctypes.data, len(logits_V), token, best, isa_limit, temperature)
    return (float(found[0]), float(found[1])) if library.abyssal_mass(record) == OK else None
