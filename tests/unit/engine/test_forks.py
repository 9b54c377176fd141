"""Several completions of one prompt: its pages shared, copied by who writes first, and tokens of separate requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from abyssal.cache.paged import PageDtype
from abyssal.cache.pages import PAGE
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import CompletionOutput, Request, RequestOutput, SamplingParams, StepPlan
from abyssal.engine.random import fork_seed
from abyssal.engine.request import pages_for
from abyssal.model.transformer import Transformer
from tests.support.engine_trials import texts, trial_model

PARAMS = SamplingParams(temperature=0.9, seed=4, max_tokens=40, ignore_eos=True, logprobs=0)
CONFIG = EngineConfig(deterministic=True, prefix_cache=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return trial_model("latent", torch.float32)


def prompt(length: int, text: int = 0) -> tuple[int, ...]:
    return tuple(texts(2)[text][:length])


class Watched:
    """An engine whose plans and pages are looked at in every step."""

    def __init__(self, model: Transformer, config: EngineConfig) -> None:
        self.engine = Engine(model, config=config)
        self.copies = 0
        self.outputs: dict[int, RequestOutput] = {}
        plan = self.engine.scheduler.plan

        def counting(*arguments: Any) -> StepPlan:
            made = plan(*arguments)
            self.copies += len(made.copies)
            return made

        self.engine.scheduler.plan = counting  # type: ignore[method-assign]

    def step(self) -> None:
        self.outputs |= {output.request_id: output for output in self.engine.step()}
        self.engine.scheduler.check()

    def pages_in_use(self) -> int:
        return len({page for sequence in self.engine.scheduler.sequences.values() for page in sequence.pages})

    def run(self) -> dict[int, RequestOutput]:
        while self.engine.unfinished:
            self.step()
        assert self.pages_in_use() == 0
        return self.outputs


def separately(model: Transformer, request: Request, page_dtype: PageDtype = "model") -> list[CompletionOutput]:
    """Each completion as a request of its own, with the seed of its fork."""
    found: list[CompletionOutput] = []
    for index in range(request.params.num_samples):
        params = replace(request.params, n=1, best_of=None, seed=fork_seed(request.params.seed or 0, index))
        watched = Watched(model, replace(CONFIG, page_dtype=page_dtype))
        watched.engine.add(replace(request, request_id=0, params=params))
        found.append(watched.run()[0].outputs[0])
    return found


def results(outputs: Iterable[CompletionOutput]) -> list[tuple[Any, ...]]:
    return [(output.token_ids, output.logprobs, output.finish_reason) for output in outputs]


@pytest.mark.parametrize(("length", "page_dtype"), [(1, "model"), (30, "model"), (100, "fp8"), (128, "model")])
def test_pages_are_those_of_one_prompt_and_a_copy_for_whoever_writes(
    model: Transformer, length: int, page_dtype: PageDtype
) -> None:
    """To the page, at every step: full pages of the prompt once, all others once for each completion."""
    request = Request(0, prompt(length), replace(PARAMS, n=3))
    watched = Watched(model, replace(CONFIG, page_dtype=page_dtype))
    watched.engine.add(request)
    shared = length // PAGE
    while watched.engine.unfinished:
        watched.step()
        going_on = [output for output in watched.outputs[0].outputs if output.finish_reason is None]
        computed = [length + len(output.token_ids) - 1 for output in going_on]
        if all(count > length for count in computed):
            owned = sum(pages_for(count) - shared for count in computed)
            assert watched.pages_in_use() == (shared + owned if going_on else 0)
        else:  # nobody has written yet: all in the prompt's own pages
            assert watched.pages_in_use() == pages_for(length)
    assert watched.copies == (2 if length % PAGE else 0), "the last to write keeps the page"
    assert results(watched.outputs[0].outputs) == results(separately(model, request, page_dtype))


def test_forks_are_preempted_cancelled_and_ended_one_by_one(model: Transformer) -> None:
    """Three requests of three completions share a memory that holds hardly one of them; one request is cancelled and
    some completions end before the others."""
    stops = replace(PARAMS, n=3, stop_token_ids=(3, 4, 5), ignore_eos=False)
    requests = [
        Request(0, prompt(60), replace(PARAMS, n=3)),
        Request(1, prompt(60), replace(PARAMS, n=3, seed=5)),
        Request(2, prompt(100, 1), stops),
    ]
    watched = Watched(model, replace(CONFIG, cache_tokens=8 * PAGE, token_budget=24, max_sequences=9))
    for request in requests:
        watched.engine.add(request)
    for _ in range(40):
        watched.step()
    watched.engine.cancel(1)
    outputs = watched.run()
    assert watched.engine.scheduler.num_preemptions > 0
    for request in requests:
        found, wanted = outputs[request.request_id].outputs, separately(model, request)
        if request.request_id == 1:
            assert {each.finish_reason for each in found} == {"cancelled"}
            assert any(each.token_ids for each in found)
            for mine, alone in zip(found, wanted, strict=True):
                assert mine.token_ids == alone.token_ids[: len(mine.token_ids)]
        else:
            assert results(found) == results(wanted)
    ends = [each.finish_reason for each in outputs[2].outputs]
    assert "stop" in ends and len({len(each.token_ids) for each in outputs[2].outputs}) > 1


@pytest.mark.parametrize("n", [1, 2])
def test_the_best_are_those_of_highest_mean_log_probability(model: Transformer, n: int) -> None:
    """With drafts, a shared prompt in the prefix cache, and preemption."""
    request = Request(0, prompt(100), replace(PARAMS, n=n, best_of=4))
    config = replace(CONFIG, prefix_cache=True, cache_tokens=9 * PAGE, num_drafts=2, max_sequences=8)
    watched = Watched(model, config)
    watched.engine.add(request)
    watched.engine.add(Request(1, prompt(100), replace(PARAMS, seed=9)))
    found = watched.run()[0].outputs
    ranked = sorted(separately(model, request), key=_mean_logprob, reverse=True)
    assert results(found) == results(ranked[:n]) and [each.index for each in found] == list(range(n))


def _mean_logprob(output: CompletionOutput) -> float:
    logprobs = [each.logprob for each in output.logprobs or ()]
    return sum(logprobs) / len(logprobs)
