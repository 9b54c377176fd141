"""Contenders of a race and masses before a token: nobody who may win is missing, and few others are there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels.native import ISA_NAMES, isa_name, native_library
from abyssal.kernels.race import MASS_ERROR, TEMPERATURES, contenders, masses, reference

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")

MOST = 4096
ISAS = range(ISA_NAMES.index(isa_name() or "generic") + 1)


def logits_of(seed: int, rows: int, tokens: int, spread: float, masked: float, equal: bool) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits_TV = (random.standard_normal((rows, tokens)) * spread).astype(np.float32)
    if equal:
        logits_TV = np.round(logits_TV)
    logits_TV[random.random(logits_TV.shape) < masked] = -np.inf
    logits_TV[:, random.integers(tokens)] = spread
    return logits_TV


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 4),
    tokens=st.sampled_from([1, 2, 255, 256, 257, 3000, 40000]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0, 1e4]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.floats(math.log10(TEMPERATURES[0]), math.log10(TEMPERATURES[1])).map(lambda power: 10.0**power),
    equal=st.booleans(),
)
def test_who_may_win_is_never_missing(seed, rows, tokens, spread, masked, temperature, equal) -> None:
    logits_TV = logits_of(seed, rows, tokens, spread, masked, equal)
    random = np.random.default_rng(seed)
    arguments = (
        logits_TV,
        logits_TV.argmax(1),
        np.full(rows, temperature),
        random.integers(0, 2**64, rows, dtype=np.uint64),
        random.integers(0, 2**32, rows),
        int(random.integers(5)),
    )
    wanted = reference(*arguments)
    for isa in ISAS:
        found = contenders(*arguments, MOST, isa_limit=isa)
        assert found is not None
        for row, ids in enumerate(wanted):
            if found.counts_T[row] < 0:
                assert len(ids) > MOST / 4, "too many are said to be there"
                continue
            kept = found.ids_TM[row, : found.counts_T[row]]
            assert (np.diff(kept) > 0).all() and np.isin(ids, kept).all()


def test_few_others_are_looked_at() -> None:
    """Who arrives just after the likeliest may be among them: -log(u) is larger than 1 - u, but not by much where it
    matters."""
    logits_TV = logits_of(0, 200, 20000, 3.0, 0.0, False)
    arguments = logits_TV, logits_TV.argmax(1), np.ones(200), np.arange(200, dtype=np.uint64), np.arange(200), 0
    found = contenders(*arguments, MOST)
    assert found is not None and (found.counts_T >= 0).all()
    wanted = sum(map(len, reference(*arguments)))
    assert wanted <= found.counts_T.sum() <= 1.2 * wanted + 200


def test_more_than_there_is_room_for() -> None:
    flat_TV = np.zeros((3, 500), np.float32)
    best_T, seeds_T = np.zeros(3, np.int64), np.arange(3, dtype=np.uint64)
    arguments = flat_TV, best_T, np.ones(3), seeds_T, np.arange(3), 0
    counts = [len(ids) for ids in reference(*arguments)]
    found = contenders(*arguments, 1)
    assert found is not None
    assert [count > 1 for count in counts] == (found.counts_T == -1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 16, 255, 257, 5000]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    masked=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([1e-3, 0.3, 1.0, 50.0]),
    equal=st.booleans(),
)
def test_masses_are_within_their_bound(seed, tokens, spread, masked, temperature, equal) -> None:
    (logits_V,) = logits_of(seed, 1, tokens, spread, masked, equal)
    best, token = int(logits_V.argmax()), int(np.random.default_rng(seed).integers(tokens))
    with np.errstate(over="ignore"):
        weights_V = np.exp((logits_V.astype(np.float64) - logits_V[best]) / temperature)
    before_V = (logits_V > logits_V[token]) | ((logits_V == logits_V[token]) & (np.arange(tokens) < token))
    for isa in ISAS:
        found = masses(logits_V, token, best, temperature, isa_limit=isa)
        assert found is not None
        assert found == pytest.approx(
            (weights_V[before_V].sum(), weights_V.sum()), abs=MASS_ERROR * weights_V.sum() / 4
        )


def test_what_it_does_not_take_is_left() -> None:
    logits_TV = np.zeros((2, 8), np.float32)
    rest = np.zeros(2, np.int64), np.ones(2), np.zeros(2, np.uint64), np.zeros(2, np.int64), 0, 4
    assert contenders(logits_TV.astype(np.float64), *rest) is None
    assert contenders(logits_TV[:, ::2], *rest) is None
    assert contenders(logits_TV, rest[0] + 8, *rest[1:]) is None, "no such token"
    assert masses(logits_TV[0], 8, 0, 1.0) is None and masses(logits_TV[0, ::2], 0, 0, 1.0) is None
