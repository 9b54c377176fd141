"""Penalties and bias on single logits, against a loop that does what the definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.messages import SamplingParams
from abyssal.engine.penalties import TokenHistory, add_bias, has_penalty, penalise

TOKENS = st.lists(st.integers(0, 9), max_size=12)


def _slow(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    changed = [np.float32(logit) for logit in logits]
    for token in range(len(logits)):
        if token in prompt or token in output:
            penalty = np.float32(params.repetition_penalty)
            changed[token] = changed[token] * penalty if changed[token] < 0 else changed[token] / penalty
        times = output.count(token)
        if times:
            changed[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
    return [float(logit) for logit in changed]


@settings(max_examples=60, deadline=None)
@given(
    TOKENS,
    TOKENS,
    TOKENS,
    st.sampled_from([1.0, 1.3, 0.7]),
    st.sampled_from([0.0, 0.5, -1.5]),
    st.sampled_from([0.0, 0.25, -0.5]),
)
def test_penalties_do_what_their_definitions_say(
    prompt: list[int], output: list[int], drafted: list[int], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, top_k=3
    )
    logits = np.linspace(-2, 2.5, 10, dtype=np.float32)
    expected = _slow(logits.tolist(), params, prompt, output + drafted)
    history = TokenHistory(prompt)
    half = len(output) // 2
    history.append(output[:half])
    history.append(output[half:])
    penalise(logits, params, history, drafted)
    assert logits.tolist() == pytest.approx(expected, abs=1e-6)
    assert has_penalty(params) == (repetition != 1.0 or presence != 0.0 or frequency != 0.0)


def test_bias_is_added_and_kept_inside_the_vocabulary() -> None:
    logits = np.zeros(4, np.float32)
    add_bias(logits, {1: 2.5, 3: -100.0})
    assert logits.tolist() == [0.0, 2.5, 0.0, -100.0]
    with pytest.raises(ValueError, match="logit_bias: token 4 is outside the vocabulary of 4"):
        add_bias(logits, {4: 1.0})
