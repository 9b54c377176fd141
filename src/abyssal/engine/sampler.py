"""From logits to tokens: each row by its own parameters, as if it were alone.

The order is that of transformers: penalties and bias, then what may not come (end tokens before ``min_tokens``, tokens
that a structure forbids), temperature, top-k, top-p (nucleus sampling, Holtzman et al. 2020), min-p, and a draw.

**The draw** is a race: token v gets an exponential number of rate p_v, and the smallest wins, which happens with
probability p_v (the Gumbel-max trick).  Its numbers depend on (seed, position, token) alone, so a request's tokens do
not depend on its batch.  The race rather than one number against the cumulative sum, though it takes a number a token:
two similar distributions that race with the same numbers mostly choose the same token, so a draft made with the
target's numbers is mostly accepted, and accepted or not, the tokens are those of plain sampling, bit for bit
(:mod:`abyssal.engine.verify`).

Everything is NumPy on the CPU, vectorised over rows.  Every function used gives a row the same bits whatever the other
rows are, which torch's sums do not.  On a GPU the logits cross to the host: 0.5 MB a row at 129K tokens.

Legend: T rows, R of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.logprobs import row_blocks
from abyssal.engine.messages import SamplingParams
from abyssal.engine.penalties import TokenHistory, add_bias, has_penalty, penalise
from abyssal.engine.random import Purpose, exponentials, exponentials_at


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
    tokens_T = np.zeros(len(rows), np.int64)
    errors: dict[int, str] = {}
    for block in row_blocks(len(rows), logits_TV.shape[1]):
        members = rows[block]
        edited_TV, best_T, bad = _edited(logits_TV[block], members)
        tokens_T[block] = best_T
        errors.update({block.start + row: message for row, message in bad.items()})
        for chosen, narrowed in _drawn(members, bad, logits_TV.shape[1]):
            group = [members[row] for row in chosen]
            weights_RV = _weights(edited_TV[chosen], edited_TV[chosen, best_T[chosen]], group, narrowed)
            tokens_T[block.start + np.array(chosen)] = race(weights_RV, group, purpose, sparse=narrowed)
    return Draws(tokens_T, errors)


def distribution(logits_TV: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, dict[int, str]]:
    """The probabilities that :func:`sample_rows` draws by, FP64 (T, V), and errors as there (their rows are 0)."""
    probabilities_TV = np.zeros(logits_TV.shape, np.float64)
    errors: dict[int, str] = {}
    for block in row_blocks(len(rows), logits_TV.shape[1]):
        members = rows[block]
        edited_TV, best_T, bad = _edited(logits_TV[block], members)
        errors.update({block.start + row: message for row, message in bad.items()})
        greedy = [row for row, member in enumerate(members) if member.params.temperature == 0 and row not in bad]
        probabilities_TV[block.start + np.array(greedy, np.int64), best_T[greedy]] = 1.0
        for chosen, narrowed in _drawn(members, bad, logits_TV.shape[1]):
            group = [members[row] for row in chosen]
            weights_RV = _weights(edited_TV[chosen], edited_TV[chosen, best_T[chosen]], group, narrowed)
            weights_RV /= weights_RV.sum(axis=-1, keepdims=True)
            probabilities_TV[block.start + np.array(chosen)] = weights_RV
    return probabilities_TV, errors


def race(weights_RV: np.ndarray, rows: Sequence[Row], purpose: Purpose, sparse: bool = False) -> np.ndarray:
    """Tokens (R,) drawn with probability proportional to the weights, of which each row has one above 0.

    ``sparse``, where most weights are 0, makes only the random numbers that can win; the result is the same.
    """
    seeds, positions = [row.seed for row in rows], [row.position for row in rows]
    with np.errstate(divide="ignore", over="ignore"):
        if not sparse:
            times_RV = exponentials(seeds, positions, purpose, weights_RV.shape[1])
            times_RV /= weights_RV
        else:
            at_N = np.flatnonzero(weights_RV)
            rows_N, tokens_N = np.divmod(at_N, weights_RV.shape[1])
            times_RV = np.full(weights_RV.shape, np.inf)
            times_N = exponentials_at(seeds, positions, purpose, rows_N, tokens_N)
            times_RV.reshape(-1)[at_N] = times_N / weights_RV.reshape(-1)[at_N]
    return times_RV.argmin(axis=-1)


def _edited(logits_TV: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Logits after penalties and bans (copied only if there are some), each row's best token, and errors by row."""
    assert logits_TV.dtype == np.float32 and len(logits_TV) == len(rows)
    errors: dict[int, str] = {}
    # NaN is the maximum of its row, so that both say whether a row is fit to be drawn from.
    raw_T = logits_TV.max(axis=-1)
    for row in np.flatnonzero(~np.isfinite(raw_T)):
        errors[int(row)] = f"logits: the largest is {raw_T[row]}; the model's weights or its input are broken"
    edited_rows = [row for row, member in enumerate(rows) if row not in errors and _is_edited(member)]
    if edited_rows:
        logits_TV = logits_TV.copy()
    for row in edited_rows:
        try:
            _edit(logits_TV[row], rows[row])
        except ValueError as error:
            errors[row] = str(error)
    best_T = logits_TV.argmax(axis=-1)
    for row in edited_rows:
        if row not in errors and logits_TV[row, best_T[row]] == -np.inf:
            errors[row] = _nothing_left(rows[row])
    return logits_TV, best_T, errors


def _is_edited(row: Row) -> bool:
    params = row.params
    early = row.num_outputs < params.min_tokens and row.ends
    return bool(row.allowed is not None or params.logit_bias or early or has_penalty(params))


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


def _drawn(rows: Sequence[Row], errors: Mapping[int, str], vocab_size: int) -> list[tuple[list[int], bool]]:
    """Rows to be drawn at random, in two groups: whether the tail is cut off by rank, which takes a sort."""
    groups: tuple[list[int], list[int]] = ([], [])
    for row, member in enumerate(rows):
        params = member.params
        if params.temperature > 0 and row not in errors:
            groups[0 < params.top_k < vocab_size or params.top_p < 1.0].append(row)
    return [(group, bool(narrowed)) for narrowed, group in enumerate(groups) if group]


def _weights(logits_RV: np.ndarray, maxima_R: np.ndarray, rows: Sequence[Row], narrowed: bool) -> np.ndarray:
    """Unnormalised probabilities, FP64: 1 for the likeliest token, 0 for those cut off."""
    temperatures_R = np.array([row.params.temperature for row in rows])
    weights_RV = logits_RV.astype(np.float64)
    weights_RV -= maxima_R[:, None]
    with np.errstate(over="ignore"):
        weights_RV /= temperatures_R[:, None]
    np.exp(weights_RV, out=weights_RV)
    if narrowed:
        _narrow(weights_RV, rows)
    min_p_R = np.array([row.params.min_p for row in rows])
    if min_p_R.any():
        weights_RV[weights_RV < min_p_R[:, None]] = 0.0
    return weights_RV


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


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ``ValueError`` for values outside their range, naming the field."""
    SamplingParams(temperature=temperature, top_p=top_p)


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """Draw one token from one row, by a seed taken from ``generator``.

    Raises:
        ValueError: logits that are not finite.
    """
    seed = 0 if temperature == 0.0 else int(torch.randint(1 << 62, (), generator=generator))
    params = SamplingParams(temperature=temperature, top_p=top_p)
    draws = sample_rows(as_rows(logits_V[None]), [Row(params, seed, 0)])
    if draws.errors:
        raise ValueError(draws.errors[0])
    return int(draws.tokens_T[0])
