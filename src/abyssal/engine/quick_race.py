"""Draws by looking at the few tokens that may win (:mod:`abyssal.kernels.race`): the same tokens, some twenty times
sooner over a large vocabulary.

Legend: R rows, V vocabulary, N (row, token) pairs, M places for the contenders of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from abyssal.engine.messages import SamplingParams
from abyssal.engine.random import Purpose, seed_words
from abyssal.kernels import race
from abyssal.kernels.counter_random import exponentials_at

if TYPE_CHECKING:
    from abyssal.engine.sampler import Row

UNDECIDED = -1
MOST_CONTENDERS = 2048
"""Of a row; a distribution so flat that it has more is drawn from by the definition."""
_TRIES = 6
"""Arrivals that are looked at before a row is left to the definition."""


def quick_race(logits_RV: np.ndarray, best_R: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """Tokens (R,) drawn as by the definition, or :data:`UNDECIDED`: where this does not apply, or rounding decides.

    Rows with top-k are the definition's: it takes a few tokens of each and no others' numbers as it is, while here most
    arrivals would be cut off.

    Args:
        logits_RV: FP32, after penalties and masks.
        best_R: each row's likeliest token.
    """
    tokens_R = np.full(len(rows), UNDECIDED)
    temperatures_R = np.array([row.params.temperature for row in rows])
    coldest, hottest = race.TEMPERATURES
    if not coldest <= temperatures_R.min() <= temperatures_R.max() <= hottest:
        return tokens_R
    seeds_R, positions_R = seed_words([row.seed for row in rows]), np.array([row.position for row in rows])
    found = race.contenders(logits_RV, best_R, temperatures_R, seeds_R, positions_R, purpose, MOST_CONTENDERS)
    if found is None:
        return tokens_R
    counts_R = found.counts_T.clip(0)
    ids_N = found.ids_TM[np.arange(MOST_CONTENDERS) < counts_R[:, None]]
    rows_N = np.repeat(np.arange(len(rows)), counts_R)
    weights_N = _weights(logits_RV, best_R, temperatures_R, rows_N, ids_N)
    with np.errstate(divide="ignore", over="ignore"):
        times_N = exponentials_at(found.starts_T[rows_N], ids_N) / weights_N
    stop = 0
    for row, count in enumerate(counts_R.tolist()):
        start, stop = stop, stop + count
        if count:
            one = slice(start, stop)
            params, best = rows[row].params, int(best_R[row])
            tokens_R[row] = _first(logits_RV[row], ids_N[one], times_N[one], weights_N[one], best, params)
    return tokens_R


def _weights(
    logits_RV: np.ndarray, best_R: np.ndarray, temperatures_R: np.ndarray, rows_N: np.ndarray, ids_N: np.ndarray
) -> np.ndarray:
    """Unnormalised probabilities, FP64 (N,), each with the bits that the sampler gives it in a whole row."""
    largest_R = logits_RV[np.arange(len(best_R)), best_R].astype(np.float64)
    weights_N = logits_RV[rows_N, ids_N].astype(np.float64) - largest_R[rows_N]
    with np.errstate(over="ignore"):
        return np.exp(weights_N / temperatures_R[rows_N])


def _first(
    logits_V: np.ndarray, ids: np.ndarray, times: np.ndarray, weights: np.ndarray, best: int, params: SamplingParams
) -> int:
    """Of one row, the first to arrive that the parameters do not cut off."""
    if params.top_p == 1.0 and params.min_p == 0.0:
        return int(ids[times.argmin()])
    for index in np.argsort(times, kind="stable")[:_TRIES].tolist():
        stays = _stays(logits_V, int(ids[index]), float(weights[index]), best, params)
        if stays is None:
            return UNDECIDED
        if stays:
            return int(ids[index])
    return UNDECIDED


def _stays(logits_V: np.ndarray, token: int, weight: float, best: int, params: SamplingParams) -> bool | None:
    """Whether top-p and min-p leave a token; None where it is not known."""
    if weight < params.min_p:
        return False
    if params.top_p == 1.0:
        return True
    found = race.masses(logits_V, token, best, params.temperature)
    if found is None:
        return None
    mass_before, mass = found
    left = params.top_p * mass - mass_before
    return None if abs(left) <= race.MASS_ERROR * mass else left > 0
