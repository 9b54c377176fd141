"""Log-probabilities of chosen tokens and of the likeliest ones, for outputs and prompts.

They are the model's own: of the logits as they are, before temperature, penalties and masks.  So they compare across
requests and agree with what a trainer computes for the same tokens; those of the distribution sampled from would not.
Computed in FP64 from FP32 logits, each row by itself, in blocks of rows so that a long prompt over a large vocabulary
takes little memory.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from abyssal.engine.messages import TokenLogprobs
from abyssal.kernels.log_normaliser import log_normaliser

BLOCK_ELEMENTS = 1 << 15
"""Logits that are worked on at once, 256 KiB in FP64: larger steps wait for memory."""


def row_blocks(num_rows: int, vocab_size: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Consecutive rows that together hold about ``elements`` logits.  A row's result never depends on them."""
    rows = max(1, elements // vocab_size)
    for start in range(0, num_rows, rows):
        yield slice(start, min(num_rows, start + rows))


def token_logprobs(
    logits_TV: np.ndarray, tokens: Sequence[int], num_top: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Of each row: its token's log-probability and rank, and the ``num_top`` likeliest tokens.

    Args:
        logits_TV: FP32, finite.
        tokens: the token chosen at each row.
        num_top: how many of the likeliest to list; None where nothing is asked for.  Of equally likely tokens the one
            with the smaller id comes first.
    """
    wanted = [row for row, top in enumerate(num_top) if top is not None]
    results: list[TokenLogprobs | None] = [None] * len(num_top)
    for block in row_blocks(len(wanted), logits_TV.shape[1]):
        rows = wanted[block]
        block_TV = logits_TV[rows]
        for row, logits_V, normaliser in zip(rows, block_TV, log_normaliser(block_TV), strict=True):
            results[row] = _of_row(logits_V, int(tokens[row]), num_top[row] or 0, float(normaliser))
    return results


def _of_row(logits_V: np.ndarray, token: int, num_top: int, normaliser: float) -> TokenLogprobs:
    rank = 1 + int(np.count_nonzero(logits_V > logits_V[token]))
    top = tuple((int(other), float(logits_V[other]) - normaliser) for other in likeliest(logits_V, num_top))
    return TokenLogprobs(token, float(logits_V[token]) - normaliser, rank, top)


def likeliest(logits_V: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` largest logits, largest first, equal ones by id."""
    count = min(count, len(logits_V))
    if count == 0:
        return np.empty(0, np.int64)
    least = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
    candidates = np.flatnonzero(logits_V >= least)
    return candidates[np.argsort(-logits_V[candidates], kind="stable")][:count]
