"""Drafted tokens against the model's own distribution: which to keep, and the token after them.

The output is distributed exactly as plain sampling's, whatever the drafts are.  There are two ways.

- **By the target's choice** (``probabilities`` None): at each position the token is drawn as it would be without
  drafts, and the draft is accepted if it is that token.  So the *tokens* are those of plain sampling, bit for bit, and
  a seed gives one text, speculated or not.  For greedy drafts no rule accepts more.  For drafts that were drawn with
  the target's random numbers (``Purpose.SAMPLE``) at least (1 - d) / (1 + d) are accepted, d being the total variation
  distance of the two distributions (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
  speculative decoding", 2024).
- **Rejection sampling** (``probabilities`` q of drafts drawn from q with ``Purpose.DRAFT``; Leviathan, Kalman and
  Matias 2023, Chen et al. 2023): draft x is accepted with probability min(1, p(x) / q(x)), and replaced on rejection by
  a draw from max(p - q, 0), normalised.  1 - d are accepted, the most that is possible; a seed's text then depends on
  the drafts.

Temperature, top-k, penalties and structure masks are inside p.  p after j drafts is that of a sequence that holds them.

Legend: T rows, k drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from abyssal.engine.random import Purpose, uniforms
from abyssal.engine.sampler import Row, distribution, race, sample_rows


@dataclass(frozen=True)
class Drafted:
    """A sequence with its drafts."""

    row: Row
    """Of the position of the first draft."""
    tokens: tuple[int, ...] = ()
    """The k drafts; without any, verification is plain sampling."""
    probabilities: np.ndarray | None = None
    """(k, V) distributions that the drafts were drawn from; None: accept what the target itself chooses."""
    allowed: Sequence[np.ndarray | None] | None = None
    """k + 1 masks of a structure, each after the drafts before it; None: ``row.allowed`` for each."""

    def rows(self) -> list[Row]:
        """Of its k + 1 rows of logits."""
        if not self.tokens and self.allowed is None:
            return [self.row]
        return [self._row(index) for index in range(len(self.tokens) + 1)]

    def _row(self, index: int) -> Row:
        row = self.row
        return Row(
            row.params,
            row.seed,
            row.position + index,
            row.num_outputs + index,
            row.history,
            row.drafted + self.tokens[:index],
            row.ends,
            row.allowed if self.allowed is None else self.allowed[index],
        )


@dataclass(frozen=True)
class Verified:
    """What became of a sequence's drafts."""

    tokens: tuple[int, ...]
    """Accepted drafts and one token more; empty where there is an error."""
    num_accepted: int = 0
    error: str | None = None
    """Why a token could not be drawn."""


def verify(logits_TV: np.ndarray, sequences: Sequence[Drafted]) -> list[Verified]:
    """Accept or replace the drafts of each sequence.

    Args:
        logits_TV: FP32; k + 1 rows for each sequence in order, the first of the position of its first draft.

    An error at a position that is not reached, because an earlier draft was rejected, is none.
    """
    starts = [0, *accumulate(len(sequence.tokens) + 1 for sequence in sequences)]
    assert len(logits_TV) == starts[-1], (len(logits_TV), starts[-1])
    if all(sequence.probabilities is None for sequence in sequences):
        return _by_choice(logits_TV, sequences)
    results: dict[int, Verified] = {}
    for method, by_rejection in ((_by_choice, False), (_by_rejection, True)):
        members = [i for i, sequence in enumerate(sequences) if (sequence.probabilities is not None) == by_rejection]
        if members:
            kept = [row for i in members for row in range(starts[i], starts[i + 1])]
            verified = method(logits_TV[kept], [sequences[i] for i in members])
            results.update(zip(members, verified, strict=True))
    return [results[index] for index in range(len(sequences))]


def _by_choice(logits_TV: np.ndarray, sequences: Sequence[Drafted]) -> list[Verified]:
    """Drafts as far as they are the target's choices, and the choice after them."""
    draws = sample_rows(logits_TV, [row for sequence in sequences for row in sequence.rows()])
    chosen = draws.tokens_T.tolist()
    results, start = [], 0
    for sequence in sequences:
        drafts = sequence.tokens
        accepted = 0
        while accepted < len(drafts) and start + accepted not in draws.errors:
            if drafts[accepted] != chosen[start + accepted]:
                break
            accepted += 1
        error = draws.errors.get(start + accepted)
        tokens = () if error else (*drafts[:accepted], chosen[start + accepted])
        results.append(Verified(tokens, accepted, error))
        start += len(drafts) + 1
    return results


def _by_rejection(logits_TV: np.ndarray, sequences: Sequence[Drafted]) -> list[Verified]:
    """Rejection sampling: all drafts are judged at once, then each sequence gets the one token that it lacks."""
    rows = [sequence.rows() for sequence in sequences]
    starts = np.cumsum([0, *map(len, rows)])
    judged = [start + j for start, members in zip(starts, rows, strict=False) for j in range(len(members) - 1)]
    target_TV, failed = distribution(logits_TV[judged], [row for members in rows for row in members[:-1]])
    draft_TV = np.concatenate([sequence.probabilities for sequence in sequences if sequence.probabilities is not None])
    drafts_T = np.array([token for sequence in sequences for token in sequence.tokens], np.int64)
    assert draft_TV.shape == target_TV.shape, (draft_TV.shape, target_TV.shape)
    accepted_T = _accepted(target_TV, draft_TV, drafts_T, [row for members in rows for row in members[:-1]])

    results: list[Verified | None] = [None] * len(sequences)
    last: list[int] = []  # sequences whose drafts were all accepted
    replaced: list[tuple[int, int, int]] = []  # (sequence, its accepted drafts, row of the rejected one)
    first = 0
    for index, sequence in enumerate(sequences):
        k = len(sequence.tokens)
        stops = [j for j in range(k) if first + j in failed or not accepted_T[first + j]]
        if not stops:
            last.append(index)
        elif first + stops[0] in failed:
            results[index] = Verified((), stops[0], failed[first + stops[0]])
        else:
            replaced.append((index, stops[0], first + stops[0]))
        first += k
    if replaced:
        at = [row for _, _, row in replaced]
        residual_RV = _residual(target_TV[at], draft_TV[at])
        tokens = race(residual_RV, [rows[index][j] for index, j, _ in replaced], Purpose.REPLACE)
        for (index, j, _), token in zip(replaced, tokens.tolist(), strict=True):
            results[index] = Verified((*sequences[index].tokens[:j], token), j)
    if last:
        draws = sample_rows(logits_TV[[starts[index + 1] - 1 for index in last]], [rows[index][-1] for index in last])
        for i, index in enumerate(last):
            drafts, error = sequences[index].tokens, draws.errors.get(i)
            results[index] = Verified(() if error else (*drafts, int(draws.tokens_T[i])), len(drafts), error)
    return [result for result in results if result is not None]


def _accepted(target_TV: np.ndarray, draft_TV: np.ndarray, drafts_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """Whether each draft passes by itself: with probability min(1, p / q)."""
    at = np.arange(len(drafts_T))
    drawn_from_T = draft_TV[at, drafts_T]
    assert (drawn_from_T > 0).all(), "a draft of probability 0 was not drawn from the distribution that came with it"
    numbers_T = uniforms([row.seed for row in rows], [row.position for row in rows], Purpose.ACCEPT)
    return numbers_T * drawn_from_T < target_TV[at, drafts_T]


def _residual(target_RV: np.ndarray, draft_RV: np.ndarray) -> np.ndarray:
    """max(p - q, 0), not normalised.  Where rounding leaves nothing of it, p and q are the same, and p does."""
    residual_RV = np.maximum(target_RV - draft_RV, 0.0)
    nothing_R = ~residual_RV.any(axis=-1)
    residual_RV[nothing_R] = target_RV[nothing_R]
    return residual_RV
