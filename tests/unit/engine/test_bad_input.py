"""Requests that cannot be met, through ``LLM.generate``: each gets a clear error, and what runs beside them the tokens
that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.llm import LLM
from abyssal.engine.messages import Request, SamplingParams, StructuredOutput
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer, train_bpe
from tests.support.checkpoints import SMALL, random_model

SPEC = replace(SMALL, vocab_size=300, max_positions=256, bos_token_id=0, eos_token_id=1)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
GOOD = [7, 8, 9, 10, 11]
POISON = 299
"""A token whose embedding is made not to be a number."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(['some words, {} and "others" 0123456789 ' * 20], 290)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SPEC)


def bad(**changes: Any) -> SamplingParams:
    return replace(GREEDY, **changes)


def form(kind: Any, value: Any, **changes: Any) -> SamplingParams:
    return bad(structured=StructuredOutput(kind, value), ignore_eos=False, **changes)


NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
BAD: dict[str, tuple[Any, SamplingParams, str]] = {
    "no prompt": ([], GREEDY, "prompt: holds no token"),
    "a prompt longer than the model": ([5] * 256, GREEDY, "leave no room for output within the model's max_positions"),
    "a prompt longer than the cache": ([5] * 200, GREEDY, "leave no room for output in the cache"),
    "a token past the vocabulary": ([5, 300], GREEDY, "token 300 is outside the vocabulary of 300"),
    "a negative token": ([5, -1], GREEDY, "token -1 is outside the vocabulary"),
    "half a token": ([5, 1.5], GREEDY, "its tokens must be whole numbers"),
    "half a character": ("a\ud800", GREEDY, "lone surrogate"),
    "more completions than run": (
        GOOD,
        bad(n=9, temperature=1.0),
        "n: 9 completions are more than the max_sequences 8",
    ),
    "bias outside the vocabulary": (GOOD, bad(logit_bias={300: 1.0}), "logit_bias: token 300 is outside"),
    "no JSON schema": (GOOD, form("json_schema", {"type": "nothing"}), "structured: the json_schema cannot be used"),
    "an endless schema": (GOOD, form("json_schema", NODE), "requires itself again without an end"),
    "a schema against itself": (
        GOOD,
        form("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}),
        "structured: the json_schema cannot be",
    ),
    "a form that cannot go on": (GOOD, form("regex", "ab", min_tokens=5), "but the structure is complete after"),
    "nothing but ends": (
        GOOD,
        bad(min_tokens=2, stop_token_ids=tuple(range(300))),
        "vocabulary holds nothing but tokens that end the output",
    ),
}


def check(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams], messages: dict[int, str]) -> None:
    """Those of ``messages`` fail with them; the others are as they are alone."""
    outputs = llm.generate(prompts, params)
    llm.engine.scheduler.check()
    assert not llm.engine.unfinished
    for number, output in enumerate(outputs):
        if number in messages:
            assert output.finished and output.finish_reason == "error"
            assert messages[number] in (output.error or ""), output.error
        else:
            alone = LLM(llm.model, tokenizer=llm.tokenizer).generate([prompts[number]], params[number])[0]
            assert output.error is None and output.token_ids == alone.token_ids and len(output.token_ids) == 8


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_each_fails_by_itself(model: Transformer, tokenizer: Tokenizer, num_drafts: int) -> None:
    config = EngineConfig(cache_tokens=192, max_sequences=8, token_budget=32, num_drafts=num_drafts)
    llm = LLM(model, tokenizer=tokenizer, config=config)
    good = [GOOD, [20, 21], GOOD * 14]
    params = [GREEDY, bad(temperature=0.9, seed=3), GREEDY]
    asked = [good[0], *(prompt for prompt, _, _ in BAD.values()), *good[1:]]
    messages = {number: message for number, (_, _, message) in enumerate(BAD.values(), 1)}
    check(llm, asked, [params[0], *(each for _, each, _ in BAD.values()), *params[1:]], messages)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"n": 0},
        {"n": 129, "temperature": 1.0},
        {"n": 2, "temperature": 0.0},
        {"n": 3, "best_of": 2, "temperature": 1.0},
        {"min_tokens": 9, "max_tokens": 8},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"logit_bias": {3: float("inf")}},
        {"stop": ""},
    ],
    ids=str,
)
def test_parameters_are_refused_when_they_are_made(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": (5.5,) * 70}, "prompt: 5.5 is no token"),
        ({"output_ids": (b"5",)}, "prompt: b'5' is no token"),
        ({"output_ids": (-400,)}, "prompt: token -400 is outside the vocabulary"),
        ({"namespace": "a\udc80"}, "namespace: .* must be text"),
        ({"namespace": None}, "namespace: None must be text"),
        ({"user": 7}, "user: 7 must be text"),
        ({"priority": "high"}, "priority: 'high' must be a whole number"),
        ({"deadline": float("nan")}, "deadline: nan is no time"),
    ],
    ids=str,
)
def test_what_would_break_a_step_is_refused(
    model: Transformer, tokenizer: Tokenizer, changes: dict[str, Any], message: str
) -> None:
    engine = Engine(model, tokenizer)
    good = Request(0, tuple(GOOD), GREEDY, user="ä", namespace="\U0001f600")
    engine.add(good)
    with pytest.raises(ValueError, match=message):
        engine.add(replace(good, **{"request_id": 1, "prompt_ids": (5,) * 70, **changes}))
    outputs = []
    while engine.unfinished:
        outputs = engine.step()
    assert [output.finish_reason for output in outputs] == ["length"]


@pytest.mark.parametrize("tokens", [0, -64])
def test_memory_for_no_page_is_refused(model: Transformer, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"cache_tokens: {tokens}, but the cache needs memory for one page"):
        LLM(model, config=EngineConfig(cache_tokens=tokens))


def test_more_memory_than_there_is_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match=r"15625000000000 pages of .* do not fit into memory; lower cache_tokens"):
        LLM(model, config=EngineConfig(cache_tokens=10**15))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_numbers_disturb_nobody(dtype: torch.dtype, temperature: float) -> None:
    """Neither beside them, nor in the pages that they leave; as prompt, in chunks, and with the prompt's scores."""
    model = random_model(SPEC, dtype=dtype)
    with torch.no_grad():
        model.embed.weight[POISON] = torch.nan
    llm = LLM(model, config=EngineConfig(cache_tokens=6 * 64, max_sequences=4, token_budget=32))
    params = bad(temperature=temperature, seed=5)
    prompts = [GOOD, [POISON, *GOOD], GOOD * 3, [*GOOD * 13, POISON, *GOOD * 13], [9]]
    each = [params, params, params, replace(params, prompt_logprobs=0), params]
    for _ in range(2):
        check(llm, prompts, each, {1: "logits: the largest is nan", 3: "logits: the largest is nan"})


def test_all_weights_broken_is_an_error_and_no_crash() -> None:
    model = random_model(SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for num_drafts in (0, 1):
        outputs = LLM(model, config=EngineConfig(num_drafts=num_drafts)).generate([GOOD, GOOD * 20], GREEDY)
        assert all("the model's weights or its input are broken" in (output.error or "") for output in outputs)


def test_one_failing_completion_does_not_end_the_others(model: Transformer, tokenizer: Tokenizer) -> None:
    """Of several completions, one may run into what its form cannot go on with."""
    llm = LLM(model, tokenizer=tokenizer)
    params = form("regex", "a|b{30}", temperature=100.0, seed=2, n=6, min_tokens=4)
    output = llm.generate([GOOD, GOOD], [params, GREEDY])[0]
    reasons = [each.finish_reason for each in output.outputs]
    assert {"error", "length"} <= set(reasons) and "structure is complete" in (output.error or ""), reasons
    assert all(len(each.token_ids) == 8 for each in output.outputs if each.finish_reason == "length")


def test_a_step_that_fails_leaves_an_engine_that_runs(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, config=EngineConfig(token_budget=16, max_sequences=4))
    wanted = llm.generate([GOOD], GREEDY)[0].token_ids
    steps = 0

    def interrupted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt("enough")
        return Transformer.hidden(model, *args)

    monkeypatch.setattr(model, "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        llm.generate([GOOD, GOOD * 30, [9]], GREEDY)
    llm.engine.scheduler.check()
    assert not llm.engine.unfinished
    assert llm.generate([GOOD], GREEDY)[0].token_ids == wanted
    engine = Engine(model)
    engine.add(Request(0, (3, 4), GREEDY))
    steps = 3
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.add(Request(1, tuple(GOOD), GREEDY))
    told = {output.request_id: output for output in engine.step()}
    assert told[0].error == "the step that it was in failed: KeyboardInterrupt enough" and not told[1].finished


def test_a_growing_output_is_what_it_was_when_it_was_looked_at(model: Transformer, tokenizer: Tokenizer) -> None:
    llm = LLM(model, tokenizer=tokenizer)
    pieces = list(llm.stream(GOOD, GREEDY))
    assert [len(piece.token_ids) for piece in pieces] == [1, 2, 3, 4, 5, 6, 7, 8, 8][: len(pieces)]
    assert all(after.text.startswith(before.text) for before, after in pairwise(pieces))
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1] == replace(llm.generate([GOOD], GREEDY)[0], request_id=pieces[-1].request_id)


def test_a_cancelled_request_keeps_its_number_until_its_end_is_told(model: Transformer) -> None:
    engine = Engine(model)
    engine.add(Request(0, (3, 4), GREEDY))
    engine.cancel(0)
    with pytest.raises(ValueError, match="request_id: 0 is that of a request still under way"):
        engine.add(Request(0, (5,), GREEDY))
    assert [output.finish_reason for output in engine.step()] == ["cancelled"]
    engine.add(Request(0, (5,), GREEDY))
    *_, last = iter(engine.step, [])
    assert len(last[0].token_ids) == 8
