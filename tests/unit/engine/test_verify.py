"""Verification: whatever was drafted, the text is distributed as plain sampling's, or is plain sampling's."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.messages import SamplingParams
from abyssal.engine.penalties import TokenHistory
from abyssal.engine.random import Purpose
from abyssal.engine.sampler import Row, distribution, race, sample_rows
from abyssal.engine.verify import Drafted, Verified, verify
from tests.support.statistics import assert_drawn_from

VOCAB = 4
TARGET = (1.5 * np.random.default_rng(0).standard_normal((VOCAB, VOCAB))).astype(np.float32)
"""A model whose logits depend on the last token."""
DRAFTER = (TARGET + np.random.default_rng(1).standard_normal((VOCAB, VOCAB))).astype(np.float32)


def _plain(row: Row, length: int) -> list[int]:
    """The text after token 0, without drafts."""
    tokens, last = [], 0
    for index in range(length):
        history = TokenHistory([1], tokens)
        here = replace(row, position=row.position + index, num_outputs=index, history=history)
        last = int(sample_rows(TARGET[[last]], [here]).tokens_T[0])
        tokens.append(last)
    return tokens


def _texts(params: SamplingParams) -> dict[tuple[int, ...], np.ndarray]:
    """The target's probabilities of the next token, by what was written after token 0: none, one or two tokens."""
    written = [text for length in range(3) for text in itertools.product(range(VOCAB), repeat=length)]
    rows = [Row(params, 0, 5, len(text), TokenHistory([1], text), ends=(2,)) for text in written]
    probabilities, errors = distribution(TARGET[[(0, *text)[-1] for text in written]], rows)
    assert not errors
    return dict(zip(written, probabilities, strict=True))


@pytest.mark.parametrize(
    ("params", "draws", "by_rejection"),
    [
        pytest.param(SamplingParams(), 20_000, True, id="by rejection"),
        pytest.param(SamplingParams(), 20_000, False, id="by the target's choice"),
        pytest.param(SamplingParams(), 100_000, False, id="by the target's choice, often", marks=pytest.mark.slow),
        *[
            pytest.param(params, 8_000, by_rejection, id=f"{name}, {'rejected' if by_rejection else 'chosen'}")
            for by_rejection in (True, False)
            for name, params in {
                "top-k and min-p": SamplingParams(temperature=0.8, top_k=3, min_p=0.02),
                "top-p": SamplingParams(temperature=1.3, top_p=0.75),
                "penalties": SamplingParams(
                    repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7, min_tokens=2
                ),
            }.items()
        ],
    ],
)
def test_what_is_verified_is_drawn_from_the_target(params: SamplingParams, draws: int, by_rejection: bool) -> None:
    """Two drafts and the token after them, against the model's own probabilities of each text of three tokens."""
    by_text = _texts(params)
    drafter = distribution(DRAFTER, [Row(SamplingParams(), 0, 0)] * VOCAB)[0]
    numbers = Purpose.DRAFT if by_rejection else Purpose.SAMPLE
    history = TokenHistory([1])
    rows = [[Row(params, seed, position, 0, history, (), (2,)) for seed in range(draws)] for position in (5, 6)]
    first = race(np.broadcast_to(drafter[0], (draws, VOCAB)), rows[0], numbers)
    second = race(drafter[first], rows[1], numbers)
    drafts = np.stack([first, second], axis=1).tolist()
    logits_TV = TARGET[np.stack([np.zeros_like(first), first, second], axis=1).reshape(-1)]
    results = verify(
        logits_TV,
        [
            Drafted(row, tuple(tokens), drafter[[0, tokens[0]]] if by_rejection else None)
            for row, tokens in zip(rows[0], drafts, strict=True)
        ],
    )
    uniform = np.random.default_rng(0).random((draws, 3)).tolist()
    edges = {text: np.append(probabilities.cumsum()[:-1], 1.0).tolist() for text, probabilities in by_text.items()}
    counts: Counter[tuple[int, ...]] = Counter()
    for result, spare in zip(results, uniform, strict=True):
        text = result.tokens
        while len(text) < 3:  # whatever follows a rejected draft is sampled from the target, as later steps would
            text = (*text, bisect_right(edges[text], spare[len(text)]))
        counts[text] += 1
    texts = list(itertools.product(range(VOCAB), repeat=3))
    expected = [by_text[()][a] * by_text[a,][b] * by_text[a, b][c] for a, b, c in texts]
    assert_drawn_from(np.array([counts[text] for text in texts]), np.array(expected))
    accepted = np.mean([result.num_accepted > 0 for result in results])
    overlap = np.minimum(by_text[()], drafter[0]).sum()
    if by_rejection:
        assert accepted == pytest.approx(overlap, abs=0.015)
    else:
        assert overlap / (2 - overlap) - 0.015 < accepted < overlap + 0.015  # (1 - d) / (1 + d), and the most there is
    assert 0.2 < accepted < 0.95


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_by_the_targets_choice_the_text_is_that_of_plain_sampling(data: st.DataObject) -> None:
    """For any drafts, with penalties, greedy or not; as many are accepted as are equal."""
    sequences, logits, texts = [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        params = SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 1.0])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 1.0])),
            min_tokens=data.draw(st.sampled_from([0, 2])),
        )
        row = Row(params, data.draw(st.integers(0, 99)), 7, history=TokenHistory([1]), ends=(2,))
        text = _plain(row, 5)
        drafts = tuple(text[: data.draw(st.integers(0, 3))])
        drafts += tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=4 - len(drafts))))
        sequences.append(Drafted(row, drafts))
        logits += [TARGET[last] for last in (0, *drafts)]
        texts.append(text)
    for sequence, result, text in zip(sequences, verify(np.array(logits), sequences), texts, strict=True):
        equal = next((i for i, token in enumerate(sequence.tokens) if token != text[i]), len(sequence.tokens))
        assert result == Verified(tuple(text[: equal + 1]), equal)


def test_greedy_drafts_with_probabilities_are_the_targets_or_replaced() -> None:
    params = SamplingParams(temperature=0.0)
    best = TARGET.argmax(axis=1)
    certain = np.eye(VOCAB)
    right, wrong = int(best[0]), int(TARGET[0].argmin())
    logits_TV = TARGET[[0, right, 0, wrong]]
    sequences = [Drafted(Row(params, 1, 0), (draft,), certain[[draft]]) for draft in (right, wrong)]
    assert verify(logits_TV, sequences) == [Verified((right, int(best[right])), 1), Verified((right,), 0)]


def test_both_ways_in_one_step_and_each_as_if_alone() -> None:
    params = SamplingParams()
    probabilities = distribution(DRAFTER[[0, 2]], [Row(params, 0, 0)] * 2)[0]
    sequences = [
        Drafted(Row(params, seed, 3), (2, 3), probabilities if seed % 2 else None)
        if seed % 3
        else Drafted(Row(params, seed, 3))
        for seed in range(90)
    ]
    logits = [TARGET[[0, *sequence.tokens]] for sequence in sequences]
    together = verify(np.concatenate(logits), sequences)
    assert together == [verify(part, [sequence])[0] for part, sequence in zip(logits, sequences, strict=True)]
    assert {result.num_accepted for result in together} == {0, 1, 2}


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_masks_stand_behind_each_draft(with_probabilities: bool) -> None:
    """A forbidden draft is rejected; a mask that lets nothing come is an error only where it is reached."""
    allow = {token: np.array([1 << token], np.uint8) for token in range(VOCAB)}
    nothing = np.zeros(1, np.uint8)
    probabilities = np.full((2, VOCAB), 0.25) if with_probabilities else None

    def outcome(*masks: np.ndarray) -> Verified:
        sequence = Drafted(Row(SamplingParams(), 0, 0), (1, 2), probabilities, masks)
        return verify(TARGET[[0, 1, 2]], [sequence])[0]

    assert outcome(allow[1], allow[2], allow[3]) == Verified((1, 2, 3), 2)
    assert outcome(allow[1], allow[0], nothing) == Verified((1, 0), 1)
    for masks, accepted in (((nothing, nothing, nothing), 0), ((allow[1], nothing, allow[3]), 1)):
        result = outcome(*masks)
        assert result.tokens == () and result.num_accepted == accepted
        assert result.error is not None and "no token can go on" in result.error
