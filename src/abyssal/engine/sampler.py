"""From logits to tokens: each row by its own parameters, as if it were alone.

The order is that of transformers: penalties and bias, then what may not come (end tokens before ``min_tokens``, tokens
that a structure forbids), temperature, top-k, top-p (nucleus sampling, Holtzman et al. 2020), min-p, and a draw.

**The draw** is a race: token v gets an exponential number of rate p_v, and the smallest wins, which happens with
probability p_v (the Gumbel-max trick).  Its numbers depend on (seed, position, token) alone, so a request's tokens do
not depend on its batch.  The race rather than one number against the cumulative sum, though it takes a number a token:
two similar distributions that race with the same numbers mostly choose the same token, so a draft made with the
target's numbers is mostly accepted, and accepted or not, the tokens are those of plain sampling, bit for bit
(:mod:`abyssal.engine.verify`).

The definition is NumPy on the CPU, vectorised over rows; mostly only the few tokens that may win are looked at
(:mod:`abyssal.engine.quick_race`).  Every function used gives a row the same bits whatever the other rows are, which
torch's sums do not.  On a GPU the logits cross to the host: 0.5 MB a row at 129K tokens.

Legend: T rows, R of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.logprobs import row_blocks
from abyssal.engine.messages import SamplingParams
from abyssal.engine.penalties import TokenHistory, add_bias, has_penalty, penalise
from abyssal.engine.quick_race import UNDECIDED, quick_race
from abyssal.engine.random import Purpose, exponentials, exponentials_at

BLOCK_ELEMENTS = 1 << 17
"""Logits that are drawn from at once by the definition: 1 MiB in FP64."""
_QUICK_ELEMENTS = 1 << 22
"""Logits whose contenders are looked for at once."""

_Kind = Literal["all", "top-p", "top-k"]

_TRIES = 4
"""Tokens that are asked for before a row is sorted after all."""


@dataclass(frozen=True)
class Row:
    """What a row of logits is sampled by."""

    params: SamplingParams
    seed: int
    """Of the sequence: :func:`~abyssal.engine.random.fork_seed` of its request's."""
    position: int
    """Of the token to be drawn: the number of tokens before it, prompt and drafts included."""
    num_outputs: int = 0
    """Tokens of the output before it, drafts included."""
    history: TokenHistory | None = None
    """Tokens before it, without drafts; needed where the parameters have a penalty."""
    drafted: tuple[int, ...] = ()
    """Drafts before it that the history does not hold."""
    ends: tuple[int, ...] = ()
    """Tokens that end the sequence, which may not come before ``min_tokens``."""
    allowed: np.ndarray | None = None
    """A bit a token, lowest first, of what a structure lets come: uint8, ceil(V / 8) or more.  None: everything."""


@dataclass(frozen=True)
class Draws:
    """Sampled tokens."""

    tokens_T: np.ndarray
    """int64; without meaning where there is an error."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why nothing could be drawn, by row."""


def as_rows(logits_TV: Tensor) -> np.ndarray:
    """FP32 logits in the host's memory; shared with ``logits_TV`` where they are that already."""
    return logits_TV.detach().to("cpu", torch.float32).contiguous().numpy()


def sample_rows(logits_TV: np.ndarray, rows: Sequence[Row], purpose: Purpose = Purpose.SAMPLE) -> Draws:
    """Draw a token from each row of FP32 logits; at temperature 0 the likeliest, of equals the one of smallest id.

    A row that cannot be drawn from (a logit is NaN or infinite, nothing is allowed, a bias is out of range) has an
    error and does not disturb the others.  ``purpose``: ``DRAFT`` for drafts whose distribution goes to the
    verification; drafts that are to be the target's own choices are drawn for ``SAMPLE``.
    """
    tokens_T, errors = _likeliest(logits_TV, rows)
    for drawn, kind, logits_RV in _drawn(logits_TV, rows, tokens_T, errors, _QUICK_ELEMENTS):
        group = [rows[row] for row in drawn]
        if kind == "top-k":
            tokens_T[drawn] = top_k_race(logits_RV, tokens_T[drawn], group, purpose)
            continue
        tokens_R = quick_race(logits_RV, tokens_T[drawn], group, purpose)
        left = np.flatnonzero(tokens_R == UNDECIDED)
        for block in row_blocks(len(left), logits_TV.shape[1], BLOCK_ELEMENTS):
            members = left[block]
            best_R = tokens_T[[drawn[member] for member in members]]
            weights_RV = _weights(logits_RV[members], best_R, [group[member] for member in members])
            finish = top_p_race if kind == "top-p" else min_p_race
            tokens_R[members] = finish(weights_RV, [group[member] for member in members], purpose)
        tokens_T[drawn] = tokens_R
    return Draws(tokens_T, errors)


def distribution(logits_TV: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, dict[int, str]]:
    """The probabilities that :func:`sample_rows` draws by, FP64 (T, V), and errors as there (their rows are 0)."""
    tokens_T, errors = _likeliest(logits_TV, rows)
    probabilities_TV = np.zeros(logits_TV.shape, np.float64)
    for drawn, kind, logits_RV in _drawn(logits_TV, rows, tokens_T, errors, BLOCK_ELEMENTS):
        group = [rows[row] for row in drawn]
        weights_RV = _weights(logits_RV, tokens_T[drawn], group)
        if kind != "all":
            _narrow(weights_RV, group)
        _apply_min_p(weights_RV, group)
        weights_RV /= weights_RV.sum(axis=-1, keepdims=True)
        probabilities_TV[drawn] = weights_RV
    greedy = [row for row, member in enumerate(rows) if member.params.temperature == 0 and row not in errors]
    probabilities_TV[greedy, tokens_T[greedy]] = 1.0
    return probabilities_TV, errors


def race(weights_RV: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """Tokens (R,) drawn with probability proportional to the weights, of which each row has one above 0."""
    return _times(weights_RV, rows, purpose).argmin(axis=-1)


def min_p_race(weights_RV: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """The :func:`race` of what min-p leaves."""
    _apply_min_p(weights_RV, rows)
    return race(weights_RV, rows, purpose)


def top_p_race(weights_RV: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """The :func:`race` of what top-p and min-p leave, mostly without the sort that :func:`_narrow` takes: who arrives
    first and would not have been cut off wins, and whether one token is cut off is a matter of sums."""
    times_RV = _times(weights_RV, rows, purpose)
    tokens_R = times_RV.argmin(axis=-1)
    for row, member in enumerate(rows):
        stays, tries = False, _TRIES
        while stays is False and tries:
            stays, tries = _stays(weights_RV[row], int(tokens_R[row]), member.params), tries - 1
            if stays is False:
                times_RV[row, tokens_R[row]] = np.inf
                tokens_R[row] = times_RV[row].argmin()
        if not stays:
            cut_RV = weights_RV[row : row + 1]
            _narrow(cut_RV, [member])
            _apply_min_p(cut_RV, [member])
            tokens_R[row] = np.where(cut_RV[0] > 0, times_RV[row], np.inf).argmin()
    return tokens_R


def top_k_race(logits_RV: np.ndarray, best_R: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """The :func:`race` of what top-k, top-p and min-p leave of FP32 logits: of so few tokens that only their weights
    and numbers are made."""
    ids, weights = [], []
    for member, logits_V, best in zip(rows, logits_RV, best_R, strict=True):
        least = np.partition(logits_V, -member.params.top_k)[-member.params.top_k]
        ids_U = np.flatnonzero(logits_V >= least)
        weights_1U = _weights(logits_V[None, ids_U], np.searchsorted(ids_U, [best]), [member])
        kept_1U = weights_1U.copy()
        _narrow(kept_1U, [member])
        _apply_min_p(kept_1U, [member])
        ids.append(ids_U[kept_1U[0] > 0])
        weights.append(weights_1U[0, kept_1U[0] > 0])
    rows_N = np.repeat(np.arange(len(rows)), [len(ids_U) for ids_U in ids])
    seeds, positions = [row.seed for row in rows], [row.position for row in rows]
    times_N = exponentials_at(seeds, positions, purpose, rows_N, np.concatenate(ids)) / np.concatenate(weights)
    times = np.split(times_N, np.flatnonzero(np.diff(rows_N)) + 1)
    return np.array([ids_U[times_U.argmin()] for ids_U, times_U in zip(ids, times, strict=True)])


def _times(weights_RV: np.ndarray, rows: Sequence[Row], purpose: Purpose) -> np.ndarray:
    """When each token arrives: an exponential number of the weight's rate; never where the weight is 0."""
    times_RV = exponentials([row.seed for row in rows], [row.position for row in rows], purpose, weights_RV.shape[1])
    with np.errstate(divide="ignore", over="ignore"):
        times_RV /= weights_RV
    return times_RV


def _likeliest(logits_TV: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, dict[int, str]]:
    """The best token of each row, int64 (T,), and by row why nothing can be drawn from it."""
    assert logits_TV.dtype == np.float32 and len(logits_TV) == len(rows)
    best_T = logits_TV.argmax(axis=-1)
    # NaN is the maximum of its row, so that the largest logit says whether the row is fit to be drawn from.
    largest_T = logits_TV[np.arange(len(rows)), best_T]
    return best_T, {
        row: f"logits: the largest is {largest_T[row]}; the model's weights or its input are broken"
        for row in np.flatnonzero(~np.isfinite(largest_T)).tolist()
    }


def _drawn(
    logits_TV: np.ndarray, rows: Sequence[Row], best_T: np.ndarray, errors: dict[int, str], elements: int
) -> Iterator[tuple[list[int], _Kind, np.ndarray]]:
    """The rows to be drawn at random, about ``elements`` logits at a time and alike: their numbers, how tokens are cut
    off by rank, and logits before that.  ``best_T`` and ``errors`` are completed with what editing makes of rows."""
    vocab_size = logits_TV.shape[1]
    worked = [
        row
        for row, member in enumerate(rows)
        if (member.params.temperature > 0 or _is_edited(member)) and row not in errors
    ]
    for members in row_blocks(len(worked), vocab_size, elements):
        block = worked[members]
        in_a_row = block[-1] - block[0] + 1 == len(block)
        as_they_are = in_a_row and not any(_is_edited(rows[row]) for row in block)
        logits_RV = logits_TV[block[0] : block[-1] + 1] if as_they_are else logits_TV[block]
        groups: dict[_Kind, list[int]] = {}
        for index, row in enumerate(block):
            if _is_edited(rows[row]):
                best_T[row], error = _edited(logits_RV[index], rows[row])
                if error:
                    errors[row] = error
                    continue
            if rows[row].params.temperature > 0:
                groups.setdefault(_kind_of(rows[row].params, vocab_size), []).append(index)
        for kind, chosen in groups.items():
            drawn = [block[index] for index in chosen]
            yield drawn, kind, logits_RV if len(drawn) == len(block) else logits_RV[chosen]


def _kind_of(params: SamplingParams, vocab_size: int) -> _Kind:
    return "top-k" if 0 < params.top_k < vocab_size else "top-p" if params.top_p < 1.0 else "all"


def _edited(logits_V: np.ndarray, row: Row) -> tuple[int, str]:
    """Edit a row in place: the best token left, and why nothing can be drawn from it."""
    try:
        _edit(logits_V, row)
    except ValueError as error:
        return 0, str(error)
    best = int(logits_V.argmax())
    return best, _nothing_left(row) if logits_V[best] == -np.inf else ""


def _is_edited(row: Row) -> bool:
    params = row.params
    return bool(row.allowed is not None or params.changes_logits or (row.num_outputs < params.min_tokens and row.ends))


def _edit(logits_V: np.ndarray, row: Row) -> None:
    params = row.params
    if has_penalty(params):
        assert row.history is not None, "penalties need the tokens so far"
        penalise(logits_V, params, row.history, row.drafted)
    if params.logit_bias:
        add_bias(logits_V, params.logit_bias)
    if row.num_outputs < params.min_tokens:
        logits_V[[token for token in row.ends if token < len(logits_V)]] = -np.inf
    if row.allowed is not None:
        allowed_V = np.unpackbits(row.allowed.view(np.uint8), count=len(logits_V), bitorder="little")
        logits_V[allowed_V == 0] = -np.inf


def _nothing_left(row: Row) -> str:
    if row.allowed is None:
        return "min_tokens: the vocabulary holds nothing but tokens that end the output; lower min_tokens"
    if row.num_outputs < row.params.min_tokens:
        return (
            f"min_tokens: {row.params.min_tokens} asked for, but the structure is complete after {row.num_outputs}; "
            "lower min_tokens"
        )
    return f"structured: after {row.num_outputs} tokens no token can go on; the {_kind(row)} cannot be met"


def _kind(row: Row) -> str:
    return "structure" if row.params.structured is None else row.params.structured.kind


def _weights(logits_RV: np.ndarray, best_R: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """Unnormalised probabilities, FP64: 1 for the likeliest token."""
    temperatures_R = np.array([row.params.temperature for row in rows])
    weights_RV = logits_RV.astype(np.float64)
    weights_RV -= weights_RV[np.arange(len(best_R)), best_R][:, None]
    with np.errstate(over="ignore"):
        weights_RV /= temperatures_R[:, None]
    return np.exp(weights_RV, out=weights_RV)


def _apply_min_p(weights_RV: np.ndarray, rows: Sequence[Row]) -> None:
    min_p_R = np.array([row.params.min_p for row in rows])
    if min_p_R.any():
        weights_RV[weights_RV < min_p_R[:, None]] = 0.0


def _stays(weights_V: np.ndarray, token: int, params: SamplingParams) -> bool | None:
    """Whether top-p and min-p leave a token; None where rounding decides, which depends on the order of sums."""
    weight = weights_V[token]
    if weight < params.min_p:
        return False
    total = weights_V.sum()
    num_equal = np.count_nonzero(weights_V[:token] == weight)
    left = params.top_p * total - (np.dot(weights_V > weight, weights_V) + num_equal * weight)
    if abs(left) <= 4 * len(weights_V) * np.finfo(np.float64).eps * total:
        return None
    return bool(left > 0)


def _narrow(weights_RV: np.ndarray, rows: Sequence[Row]) -> None:
    """Set to 0, in place, what top-k and then top-p cut off; of equals at the edge the smaller ids stay."""
    vocab_size = weights_RV.shape[1]
    top_k_R = np.array([min(row.params.top_k or vocab_size, vocab_size) for row in rows])
    top_p_R = np.array([row.params.top_p for row in rows])
    sorted_RV = np.negative(weights_RV)
    sorted_RV.sort(axis=-1)
    np.negative(sorted_RV, out=sorted_RV)
    sums_RV = np.cumsum(sorted_RV, axis=-1)
    totals_R = np.take_along_axis(sums_RV, top_k_R[:, None] - 1, axis=-1)
    # A token stays as long as those before it do not reach top_p yet.  With top_p 1 all do, whatever the rounding.
    reached_RV = (sums_RV >= top_p_R[:, None] * totals_R) & (top_p_R < 1.0)[:, None]
    counts_R = np.minimum(top_k_R, 1 + np.count_nonzero(~reached_RV, axis=-1))
    edges_R1 = np.take_along_axis(sorted_RV, counts_R[:, None] - 1, axis=-1)
    weights_RV[weights_RV < edges_R1] = 0.0
    above_R = np.count_nonzero(weights_RV > edges_R1, axis=-1)
    equal_RV = weights_RV == edges_R1
    for row in np.flatnonzero(above_R + np.count_nonzero(equal_RV, axis=-1) > counts_R):
        ties = np.flatnonzero(equal_RV[row])
        weights_RV[row, ties[counts_R[row] - above_R[row] :]] = 0.0
