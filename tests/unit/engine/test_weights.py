"""New weights under requests that run, memory given back and taken again, and the routing that outputs carry."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.cli.allocator import keep_freed_memory
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.llm import LLM
from abyssal.engine.messages import CompletionOutput, Request, RequestOutput, SamplingParams
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from tests.support.checkpoints import SMALL, assert_same_weights, random_model
from tests.support.forked import exit_status, fork

SPEC = replace(SMALL, max_positions=512)
CONFIG = EngineConfig(deterministic=True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def run(engine: Engine, steps: int | None = None) -> dict[int, RequestOutput]:
    """The newest output of each request."""
    outputs: dict[int, RequestOutput] = {}
    while engine.unfinished and (steps is None or steps > 0):
        outputs |= {output.request_id: output for output in engine.step()}
        steps = None if steps is None else steps - 1
    return outputs


def set_weights(model: Transformer, other: Transformer) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(other.state_dict()[name])


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_that_spans_an_update_goes_on_with_the_new_weights(in_place: bool, drafts: int) -> None:
    """Its further tokens are those of the new model for prompt and old tokens, not of what the old one had cached."""
    model, other = random_model(SPEC), random_model(SPEC, seed=1)
    engine = Engine(model, config=replace(CONFIG, num_drafts=drafts))
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=30, logprobs=0, return_experts=True)
    engine.add(Request(0, prompt(70), params))
    before = run(engine, 9)[0].outputs[0]
    old_ids, old_versions, old_experts = before.token_ids, before.versions, np.array(before.experts)
    if in_place:
        set_weights(model, other)
        engine.update_weights(5)
    else:
        engine.update_weights(5, {name: tensor.clone() for name, tensor in other.state_dict().items()})
    assert_same_weights(model, other)
    after = run(engine)[0].outputs[0]
    count = len(old_ids)
    assert 0 < count < 30 and after.versions == ((0, count), (5, 30 - count)) and after.weights_version == 5
    assert old_versions == ((0, count),)
    fresh = Engine(other, config=replace(CONFIG, num_drafts=drafts))
    fresh.add(Request(0, prompt(70), params, output_ids=old_ids))
    continued = run(fresh)[0].outputs[0]
    assert after.token_ids == continued.token_ids
    assert (after.logprobs or ())[count:] == continued.logprobs
    by_old, by_new = np.split(after.experts, [70 + count - 1])
    assert np.array_equal(by_old, old_experts) and np.array_equal(by_new, continued.experts[70 + count - 1 :])
    engine.add(Request(1, prompt(70), replace(params, max_tokens=1, return_experts=False)))
    run(engine)
    engine.add(Request(1, prompt(70), replace(params, max_tokens=1, return_experts=False)))
    again = run(engine)[1].outputs[0]
    assert again.cached_tokens == 64 and again.versions == ((5, 1),)


def test_old_pages_serve_nobody_after_an_update() -> None:
    model = random_model(SPEC)
    llm = LLM(model, config=CONFIG)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    llm.generate([prompt(200)], params)
    assert llm.generate([prompt(200)], params)[0].cached_tokens == 192
    set_weights(model, random_model(SPEC, seed=1))
    llm.engine.update_weights(1)
    output = llm.generate([prompt(200)], params)[0]
    assert output.cached_tokens == 0 and output.logprobs == LLM(model).generate([prompt(200)], params)[0].logprobs


def test_what_is_said_of_a_prompt_is_of_one_version() -> None:
    model = random_model(SPEC)
    engine = Engine(model, config=EngineConfig(token_budget=16, max_sequences=4))
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, return_experts=True)
    engine.add(Request(0, prompt(60), params))
    run(engine, 2)
    set_weights(model, random_model(SPEC, seed=1))
    engine.update_weights(1)
    spanning = run(engine)[0]
    alone = LLM(model).generate([prompt(60)], params)[0]
    assert spanning.prompt_logprobs == alone.prompt_logprobs and spanning.outputs[0].versions == ((1, 2),)
    assert (spanning.outputs[0].experts == alone.outputs[0].experts).all()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model, other = random_model(SPEC), random_model(SPEC, seed=1)
    engine = Engine(model)
    state = other.state_dict()
    last = list(state)[-1]
    cases = {
        "lacks embed.weight": {name: tensor for name, tensor in state.items() if name != "embed.weight"},
        "has no more": {**state, "more": torch.zeros(1)},
        rf"{last} has shape \(3,\)": {**state, last: torch.zeros(3)},
        f"{last} is torch.float64": {**state, last: state[last].double()},
        f"{last} is no plain tensor": {**state, last: torch.empty_like(state[last], device="meta")},
        "lacks mtp": {name: tensor for name, tensor in state.items() if name != last},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=f"state: .*{message}"):
            engine.update_weights(1, wrong)
    assert engine.weights_version == 0
    assert_same_weights(model, random_model(SPEC))
    engine.update_weights(2, {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")})
    assert torch.equal(model.embed.weight, other.embed.weight)
    with pytest.raises(ValueError, match="version: 2 must be above the present 2"):
        engine.update_weights(2)


def test_sleep_gives_memory_back_and_changes_no_token() -> None:
    model = random_model(SPEC)
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=30)
    wanted = LLM(model, config=CONFIG).generate([prompt(70)], params)[0]
    now = [0.0]
    engine = Engine(model, config=replace(CONFIG, num_drafts=1), clock=lambda: now[0])
    engine.add(Request(0, prompt(70), params))
    engine.add(Request(1, prompt(80), params))
    engine.add(Request(2, prompt(90), params, deadline=5.0))
    run(engine, 5)
    engine.sleep()
    engine.sleep()
    engine.add(Request(3, prompt(60), params))
    engine.cancel(1)
    assert engine.asleep and [output.request_id for output in engine.step()] == [1]
    now[0] = 6.0
    assert [(output.request_id, output.finish_reason) for output in engine.step()] == [(2, "deadline")]
    assert engine.step() == [] and engine.unfinished
    engine.scheduler.check()
    engine.wake()
    outputs = run(engine)
    assert outputs[0].token_ids == wanted.token_ids
    assert outputs[3].token_ids == LLM(model, config=CONFIG).generate([prompt(60)], params)[0].token_ids
    llm = LLM(model)
    llm.engine.sleep()
    with pytest.raises(ValueError, match="asleep"):
        llm.generate([prompt(3)], params)
    with pytest.raises(ValueError, match="asleep"):
        next(llm.stream(prompt(3), params))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def sleep_and_wake() -> None:
    keep_freed_memory()  # as a trainer beside the engine does
    tokens = 1 << 17
    llm = LLM(random_model(SPEC), config=EngineConfig(cache_tokens=tokens))
    cache = llm.engine._runner._cache
    cache.entries_PLSX.fill_(1.0)
    llm.engine.sleep()
    gc.collect()
    assert resident() > 0  # everything once: a child's own program comes into its memory as it is run
    llm.engine.wake()
    cache.entries_PLSX.fill_(1.0)
    size = tokens // 64 * cache.page_bytes
    before = resident()
    llm.engine.sleep()
    gc.collect()
    after = resident()
    assert size > 30e6 and before - after > 0.95 * size, (size, before, after)
    llm.engine.wake()
    assert cache.page_bytes == size // (tokens // 64)
    assert llm.generate([prompt(100)], SamplingParams(max_tokens=3))[0].error is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident pages")
def test_memory_is_really_returned() -> None:
    """In a child: what threads of other tests allocate meanwhile is not counted."""
    assert exit_status(fork(sleep_and_wake)) == 0


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(token_budget=16, max_sequences=4),
        EngineConfig(num_drafts=2),
        EngineConfig(deterministic=True, cache_tokens=6 * 64, token_budget=40, max_sequences=6),
        EngineConfig(cache_tokens=6 * 64, num_drafts=1),
    ],
    ids=["chunked", "drafted", "preempted", "preempted and drafted"],
)
def test_routing_is_that_of_the_sequence(config: EngineConfig) -> None:
    """Of every token but the last, for each completion, whatever happened on the way."""
    spec = replace(SPEC, num_layers=3)
    model = random_model(spec)
    llm = LLM(model, config=config)
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=80, n=2, return_experts=True)
    asked = [prompt(62), prompt(61, 1), prompt(100, 2)]
    llm.generate(asked, replace(params, return_experts=False))  # pages to be found again, were they asked for
    for given, output in zip(asked, llm.generate(asked, params), strict=True):
        for completion in output.outputs:
            assert np.array_equal(completion.experts, routing(model, spec, given, completion))
    if config.cache_tokens is not None:
        assert llm.engine.scheduler.num_preemptions > 0


@torch.no_grad()
def routing(model: Transformer, spec: ModelSpec, given: tuple[int, ...], completion: CompletionOutput) -> np.ndarray:
    tokens = [*given, *completion.token_ids][:-1]
    step = model.step(PackedBatch([len(tokens)]))
    model.hidden(torch.tensor(tokens), step)
    return np.stack([step.routings[layer].expert_ids_TK.numpy() for layer in range(1, spec.num_layers)], 1)
