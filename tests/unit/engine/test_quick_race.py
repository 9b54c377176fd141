"""Looking at a few tokens draws the very tokens that the definition draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine import quick_race, sampler
from abyssal.engine.messages import SamplingParams
from abyssal.engine.random import Purpose
from abyssal.engine.sampler import Row, sample_rows
from abyssal.kernels.native import native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.05, 0.7, 1.0, 1.5, 100.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 7]),
    logit_bias=st.sampled_from([None, None, {3: 2.0, 5: -50.0}]),
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([7, 64, 1000, 5000]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    whole=st.booleans(),
)
def test_the_tokens_are_the_definitions(
    params: list[SamplingParams], seed: int, tokens: int, spread: float, whole: bool
) -> None:
    random = np.random.default_rng(seed)
    logits_TV = (random.standard_normal((len(params), tokens)) * spread).astype(np.float32)
    if whole:  # equal logits
        logits_TV = np.round(logits_TV)
    rows = [Row(each, seed + number, number) for number, each in enumerate(params)]
    before = logits_TV.copy()
    quick = sample_rows(logits_TV, rows)
    assert (logits_TV == before).all(), "the caller's logits are left as they are"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "quick_race", lambda logits_RV, *_: np.full(len(logits_RV), quick_race.UNDECIDED))
        slow = sample_rows(logits_TV, rows)
    assert quick.tokens_T.tolist() == slow.tokens_T.tolist() and quick.errors == slow.errors


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_p": 0.8, "min_p": 0.01}], ids=["plain", "p", "min", "both"]
)
def test_hardly_any_row_is_left_to_the_definition(params: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    logits_TV = (random.standard_normal((300, 5000)) * 4).astype(np.float32)
    rows = [Row(SamplingParams(**params), seed, 3) for seed in range(300)]
    drawn = quick_race.quick_race(logits_TV, logits_TV.argmax(1), rows, Purpose.SAMPLE)
    assert np.count_nonzero(drawn == quick_race.UNDECIDED) <= 15
    assert len(set(drawn.tolist())) > 50
