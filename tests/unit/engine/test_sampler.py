"""Sampling rows: the distribution that the parameters define, drawn from in the right proportions, row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.logprobs import BLOCK_ELEMENTS
from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.engine.penalties import TokenHistory
from abyssal.engine.random import Purpose, exponentials
from abyssal.engine.sampler import Row, as_rows, distribution, race, sample_rows
from tests.support.statistics import assert_drawn_from

MAYBE = st.sampled_from


@st.composite
def _params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(MAYBE([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(MAYBE([0, 0, 1, 3, 100])),
        top_p=draw(MAYBE([1.0, 1.0, 0.37, 0.83, 1e-9])),
        min_p=draw(MAYBE([0.0, 0.0, 0.13, 1.0])),
        repetition_penalty=draw(MAYBE([1.0, 1.0, 1.3])),
        presence_penalty=draw(MAYBE([0.0, 0.0, 0.5])),
        frequency_penalty=draw(MAYBE([0.0, 0.0, -0.25])),
        logit_bias=draw(MAYBE([None, None, {0: 1.5, 2: -3.0}])),
        min_tokens=draw(MAYBE([0, 0, 4])),
    )


@st.composite
def _rows(draw: st.DrawFn, num_rows: int, vocab_size: int) -> list[Row]:
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=5)
    rows = []
    for _ in range(num_rows):
        allowed = draw(MAYBE([None, None, np.packbits(np.arange(vocab_size) % 3 != 1, bitorder="little")]))
        history = TokenHistory(draw(tokens), draw(tokens))
        drafted = tuple(draw(tokens))
        rows.append(
            Row(draw(_params()), draw(st.integers(0, 9)), draw(st.integers(0, 99)), 3, history, drafted, (0, 4))
        )
        rows[-1] = replace(rows[-1], allowed=allowed)
    return rows


def _slow(logits_V: np.ndarray, row: Row) -> list[float]:
    """Probabilities by the definitions, one number at a time."""
    params, history = row.params, row.history
    assert history is not None
    output = {token: int(times) for token, times in zip(*history.counts(row.drafted), strict=True)}
    seen, vocab_size = set(history.seen(row.drafted).tolist()), len(logits_V)
    logits = []
    for token in range(vocab_size):
        logit = float(logits_V[token])
        if token in seen:
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        if token in output:
            logit -= params.presence_penalty + params.frequency_penalty * output[token]
        logit += (params.logit_bias or {}).get(token, 0.0)
        forbidden = row.allowed is not None and token % 3 == 1
        if forbidden or (row.num_outputs < params.min_tokens and token in row.ends):
            logit = -math.inf
        logits.append(logit)
    order = sorted(range(vocab_size), key=lambda token: (-round(logits[token], 4), token))
    if params.temperature == 0:
        return [float(token == order[0]) for token in range(vocab_size)]
    weights = [math.exp((logit - logits[order[0]]) / params.temperature) for logit in logits]
    order = order[: params.top_k or vocab_size]
    kept, total, before = set(), sum(weights[token] for token in order), 0.0
    for token in order:
        if before < params.top_p * total or params.top_p == 1.0:
            kept.add(token)
        before += weights[token]
    weights = [w if token in kept and w >= params.min_p else 0.0 for token, w in enumerate(weights)]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_probabilities_are_those_of_the_definitions(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(6, 12))
    rows = data.draw(_rows(4, vocab_size))
    seed = data.draw(st.integers(0, 99))
    logits_TV = np.random.default_rng(seed).standard_normal((4, vocab_size)).astype(np.float32)
    logits_TV[3] = np.round(logits_TV[3])  # ties
    probabilities_TV, errors = distribution(logits_TV, rows)
    assert errors == {}
    for row in range(4):
        expected = _slow(logits_TV[row], rows[row])
        assert probabilities_TV[row].tolist() == pytest.approx(expected, abs=1e-5)
    tokens = sample_rows(logits_TV, rows).tokens_T
    assert (probabilities_TV[np.arange(4), tokens] > 0).all()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_row_is_sampled_as_if_it_were_alone(data: st.DataObject) -> None:
    num_rows, vocab_size = data.draw(MAYBE([(7, 11), (2, 37), (30, 1000), (40, BLOCK_ELEMENTS // 16)]))
    some = data.draw(_rows(4, vocab_size))
    rows = [replace(some[row % 4], position=row) for row in range(num_rows)]
    logits_TV = np.random.default_rng(num_rows).standard_normal((num_rows, vocab_size)).astype(np.float32)
    together, probabilities_TV = sample_rows(logits_TV, rows).tokens_T, distribution(logits_TV, rows)[0]
    for row in range(0, num_rows, 3):
        one = logits_TV[row : row + 1]
        assert sample_rows(one, [rows[row]]).tokens_T[0] == together[row]
        assert (distribution(one, [rows[row]])[0][0] == probabilities_TV[row]).all()


@pytest.mark.parametrize(
    ("params", "counter", "draws"),
    [
        (SamplingParams(), "position", 100_000),
        (SamplingParams(temperature=0.7, top_k=4), "seed", 20_000),
        (SamplingParams(temperature=1.5, top_p=0.8, min_p=0.05), "position", 20_000),
    ],
)
def test_tokens_are_drawn_in_proportion(params: SamplingParams, counter: str, draws: int) -> None:
    logits_V = np.array([0.1, 1.0, -2.0, 0.4, 0.8, -0.5], np.float32)
    rows = [Row(params, i, 3) if counter == "seed" else Row(params, 11, i) for i in range(draws)]
    tokens_T = sample_rows(np.broadcast_to(logits_V, (draws, 6)), rows).tokens_T
    assert_drawn_from(np.bincount(tokens_T, minlength=6), distribution(logits_V[None], rows[:1])[0][0])


def test_a_race_is_won_by_who_arrives_first() -> None:
    rng = np.random.default_rng(0)
    weights_RV = np.where(rng.random((50, 40)) < 0.2, rng.random((50, 40)), 0.0)
    weights_RV[:, 7] = 1.0
    tokens = race(weights_RV, [Row(SamplingParams(), i, 0) for i in range(50)], Purpose.DRAFT)
    times_RV = exponentials(range(50), [0] * 50, Purpose.DRAFT, 40)
    slow = [
        min((t / w, v) for v, (t, w) in enumerate(zip(*pair, strict=True)) if w)
        for pair in zip(times_RV, weights_RV, strict=True)
    ]
    assert tokens.tolist() == [token for _, token in slow]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_winner_is_that_of_a_race_over_the_narrowed_distribution(data: st.DataObject) -> None:
    """Without sorting rows, and whether top-p is reached at one token or at most of them; with ties, and where rounding
    decides what top-p keeps."""
    vocab_size, num_rows = data.draw(MAYBE([(2, 9), (7, 30), (100, 20), (3000, 6)]))
    spread = data.draw(MAYBE([0.0, 0.01, 1.0, 6.0]))
    some = [data.draw(_params()) for _ in range(3)]
    some = [replace(params, min_tokens=0, logit_bias=None) for params in some]
    rows = [Row(some[i % 3], i, 5, history=TokenHistory()) for i in range(num_rows)]
    logits_TV = (spread * np.random.default_rng(vocab_size).standard_normal((num_rows, vocab_size))).astype(np.float32)
    if data.draw(st.booleans()):
        logits_TV = np.round(logits_TV * 2) / 2
    tokens_T = sample_rows(logits_TV, rows).tokens_T
    probabilities_TV = distribution(logits_TV, rows)[0]
    weights_TV = probabilities_TV / probabilities_TV.max(axis=-1, keepdims=True)
    assert tokens_T.tolist() == race(weights_TV, rows, Purpose.SAMPLE).tolist()


def test_similar_distributions_mostly_draw_the_same_token() -> None:
    """What drafting with the target's numbers rests on: at least (1 - d) / (1 + d) agree."""
    rng = np.random.default_rng(1)
    target_V = rng.standard_normal(50).astype(np.float32)
    draft_V = target_V + 0.3 * rng.standard_normal(50).astype(np.float32)
    rows = [Row(SamplingParams(), 5, i) for i in range(4000)]
    p, q = (distribution(logits_V[None], rows[:1])[0][0] for logits_V in (target_V, draft_V))
    distance = np.abs(p - q).sum() / 2
    tokens = [sample_rows(np.broadcast_to(logits_V, (4000, 50)), rows).tokens_T for logits_V in (target_V, draft_V)]
    assert np.mean(tokens[0] == tokens[1]) > (1 - distance) / (1 + distance) - 0.03
    assert 0.05 < distance < 0.2


def test_a_row_that_cannot_be_drawn_from_fails_alone() -> None:
    logits_TV = np.zeros((6, 4), np.float32)
    logits_TV[1, 2], logits_TV[2, 0] = math.nan, math.inf
    nothing = np.zeros(1, np.uint8)
    schema = StructuredOutput("json_schema", {"type": "object"})
    rows = [
        Row(SamplingParams(logit_bias={0: 5.0}, temperature=0.0), 0, 0),
        Row(SamplingParams(), 0, 0),
        Row(SamplingParams(), 0, 0),
        Row(SamplingParams(logit_bias={4: 1.0}), 0, 0),
        Row(SamplingParams(structured=schema), 0, 0, 2, allowed=nothing),
        Row(SamplingParams(min_tokens=5, structured=schema), 0, 0, 2, ends=(1,), allowed=np.array([2], np.uint8)),
    ]
    before = logits_TV.copy()
    draws = sample_rows(logits_TV, rows)
    assert draws.tokens_T[0] == 0 and np.array_equal(before, logits_TV, equal_nan=True)
    assert draws.errors == distribution(logits_TV, rows)[1]
    assert sorted(draws.errors) == [1, 2, 3, 4, 5]
    assert "largest is nan" in draws.errors[1] and "largest is inf" in draws.errors[2]
    assert draws.errors[3].startswith("logit_bias: token 4 is outside")
    assert draws.errors[4] == "structured: after 2 tokens no token can go on; the json_schema cannot be met"
    assert draws.errors[5].startswith("min_tokens: 5 asked for, but the structure is complete after 2")


def test_torch_logits_become_rows() -> None:
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert as_rows(logits).dtype == np.float32 and as_rows(logits).tolist() == [[1.0, 2.0]]
    shared = torch.zeros(2, 3)
    assert as_rows(shared).ctypes.data == shared.data_ptr()


def test_a_temperature_near_zero_is_greedy() -> None:
    logits_TV = np.array([[1.0, 50.0, 2.0]], np.float32)
    for temperature in (1e-3, 1e-37, 1e-300):
        params = SamplingParams(temperature=temperature, top_p=0.9)
        assert sample_rows(logits_TV, [Row(params, 0, 3)]).tokens_T.tolist() == [1]
