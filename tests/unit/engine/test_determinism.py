"""What a request gets does not depend on what else the engine was doing: trials drawn by hypothesis.

Requests arrive, are cancelled, expire and are preempted; they share beginnings and users' turns follow one another;
memory is short or ample, chunks small or large, drafts few or none; the engine sleeps in between.  Pages are accounted
for after every step.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abyssal.cache.paged import PageDtype
from abyssal.cache.pages import PAGE
from abyssal.checkpoint.hf import load_model
from abyssal.model.transformer import Transformer
from tests.support.engine_trials import Reference, Trial, TrialRun, assert_as_alone, gap_of, texts, trial_model, trials
from tests.support.page_error import held_out_texts
from tests.support.trained_model import TrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE_DTYPES: tuple[PageDtype, ...] = get_args(PageDtype)


@cache
def model_of(kind: str, dtype: str) -> Transformer:
    return trial_model(kind, DTYPES[dtype])


@cache
def reference_of(kind: str, dtype: str, page_dtype: PageDtype) -> Reference:
    return Reference(model_of(kind, dtype), page_dtype)


Case = tuple[str, str, PageDtype]
CASES: list[Case] = [
    (kind, dtype, page_dtype) for kind in ("latent", "dense") for dtype in DTYPES for page_dtype in PAGE_DTYPES
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Trial]:
    case = draw(st.sampled_from(CASES))
    return case, draw(trials(deterministic=True, drafts=3 if case[0] == "latent" else 0, page_dtype=case[2]))


def check(case: Case, trial: Trial) -> None:
    reference = reference_of(*case)
    for result in TrialRun(trial, reference.model, texts(2), reference.store).run():
        assert_as_alone(result, reference, (trial.config.cache_tokens or 0) // PAGE)


@settings(max_examples=10, deadline=None)
@given(cases())
def test_bit_equal_to_an_undisturbed_run(drawn: tuple[Case, Trial]) -> None:
    """Deterministic mode: tokens, log-probabilities, routed experts."""
    check(*drawn)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(cases())
def test_bit_equal_to_an_undisturbed_run_at_length(drawn: tuple[Case, Trial]) -> None:
    check(*drawn)


BOUNDS = {"fp32": 1e-4, "bf16": 0.5}
"""Of a token's log-probability in default mode, by the activations' dtype, in nats."""


def check_within_bound(trained: TrainedModel, dtype: str, page_dtype: PageDtype, trial: Trial) -> None:
    """In default mode pages of generated text are shared, and preempted output is read again as a prompt: a token's
    log-probability then has come by another path, and differs in its last bits."""
    reference = trained_reference(trained.folder, dtype, page_dtype)
    rows = held_out_texts(trained.data, 4)
    strayed = 0
    for result in TrialRun(trial, reference.model, [rows[0] + rows[1], rows[2] + rows[3]], reference.store).run():
        gap = gap_of(result, reference)
        assert gap.largest <= BOUNDS[dtype] and gap.regret <= 2 * BOUNDS[dtype], gap
        strayed += gap.strayed
    assert dtype != "fp32" or strayed <= 1, "tokens change where two are as likely as each other, and nowhere else"


@cache
def trained_reference(folder: Path, dtype: str, page_dtype: PageDtype) -> Reference:
    return Reference(load_model(folder, dtype=DTYPES[dtype]), page_dtype)


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_default_mode_is_within_its_bound(
    trained_model: TrainedModel, page_dtype: PageDtype, data: st.DataObject
) -> None:
    trial = data.draw(trials(deterministic=False, drafts=2, page_dtype=page_dtype))
    check_within_bound(trained_model, "fp32", page_dtype, trial)


@pytest.mark.slow
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_default_mode_is_within_its_bound_at_length(
    trained_model: TrainedModel, dtype: str, page_dtype: PageDtype, data: st.DataObject
) -> None:
    trial = data.draw(trials(deterministic=False, drafts=2, page_dtype=page_dtype))
    check_within_bound(trained_model, dtype, page_dtype, trial)
