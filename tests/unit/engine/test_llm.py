"""The engine from end to end on small random models: the same tokens whatever runs beside them, and however."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import RequestOutput, SamplingParams
from abyssal.model.attention import LatentAttention
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL, random_model
from tests.support.parity import draw_spec

SPEC = replace(SMALL, max_positions=512)
LENGTHS = (5, 70, 130, 1, 33, 200)


def prompts(lengths: tuple[int, ...] = LENGTHS, vocab_size: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SPEC)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_greedy_tokens_are_those_of_the_plain_forward(family) -> None:
    """Up to the end token, which is the last."""
    spec = replace(draw_spec(family, 1), max_positions=512)
    model = random_model(spec, dtype=torch.float64)
    asked = prompts((5, 70, 1), spec.vocab_size)
    wanted = [_greedy(model, prompt, 12) for prompt in asked]
    ends = spec.vocab_size - 1, wanted[0][6]
    model.spec = replace(spec, eos_token_id=ends)
    params = SamplingParams(temperature=0, max_tokens=12)
    for tokens, output in zip(wanted, LLM(model).generate(asked, params), strict=True):
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        assert list(output.token_ids) == (tokens if end is None else tokens[: end + 1])
        assert output.finish_reason == ("length" if end is None else "stop")
    assert tokens_of(LLM(model).generate(asked, replace(params, ignore_eos=True))) == [tuple(each) for each in wanted]


def _greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_only_prompts_are_expanded(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding in the expanded form would write the same text, ever more slowly."""
    rows: list[int] = []
    expanded = LatentAttention._expanded

    def record(self: LatentAttention, q: torch.Tensor, *rest: Any) -> Any:
        rows.append(q.shape[-3])
        return expanded(self, q, *rest)

    monkeypatch.setattr(LatentAttention, "_expanded", record)
    LLM(model).generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert rows == [3] * SPEC.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(deterministic=True),
        EngineConfig(deterministic=True, token_budget=16, max_sequences=4),
        EngineConfig(deterministic=True, cache_tokens=5 * 64, token_budget=40, max_sequences=6),
        EngineConfig(deterministic=True, num_drafts=2),
        EngineConfig(deterministic=True, prefix_cache=False, num_drafts=1, token_budget=24, max_sequences=8),
    ],
    ids=["together", "chunked", "preempted", "drafted", "drafted in chunks"],
)
def test_tokens_and_logprobs_are_bit_equal_to_a_request_alone(dtype: torch.dtype, config: EngineConfig) -> None:
    """In any batch, any chunks, with preemption, with speculation, and again from the prefix cache."""
    model = random_model(SPEC, dtype=dtype)
    asked = prompts()
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=24, logprobs=2) for i in range(len(asked))]
    if config.cache_tokens is not None:  # all begin with a page, and all come to need three
        asked, params = prompts((62, 61, 60, 59)), [replace(each, max_tokens=80) for each in params[:4]]
    alone = [
        LLM(model, config=EngineConfig(deterministic=True)).generate([prompt], each)[0]
        for prompt, each in zip(asked, params, strict=True)
    ]
    llm = LLM(model, config=config)
    for _ in range(2):
        together = llm.generate(asked, params)
        assert tokens_of(together) == tokens_of(alone)
        assert [output.logprobs for output in together] == [output.logprobs for output in alone]
        llm.engine.scheduler.check()
    if config.cache_tokens is not None:
        assert llm.engine.scheduler.num_preemptions > 0


def test_prompt_logprobs_are_bit_equal_whatever_the_chunks(model: Transformer) -> None:
    asked = prompts()
    wanted = [LLM(model).score([prompt])[0] for prompt in asked]
    assert LLM(model, config=EngineConfig(token_budget=16, max_sequences=8)).score(asked) == wanted
    with torch.no_grad():
        logprobs = model(torch.tensor([asked[1]])).log_softmax(-1)[0]
    plain = [float(logprobs[i, token]) for i, token in enumerate(asked[1][1:])]
    assert [each.logprob for each in wanted[1][1:] if each] == pytest.approx(plain, abs=1e-4)


def test_a_second_turn_finds_its_pages(model: Transformer) -> None:
    llm = LLM(model)
    params = SamplingParams(temperature=0, max_tokens=70)
    (prompt,) = prompts((130,))
    first = llm.generate([prompt], params)[0]
    again = llm.generate([prompt], params)[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, 128)
    assert again.token_ids == first.token_ids
    longer = llm.generate([[*prompt, *first.token_ids, 3]], params)[0]
    assert longer.cached_tokens == 192, "pages of generated text are shared too"


def test_drafts_change_no_token_and_trained_ones_are_accepted(trained_model) -> None:
    text = "def read(self, size=-1):\n    "
    params = SamplingParams(temperature=0, max_tokens=48)
    plain = LLM(trained_model.model, tokenizer=trained_model.tokenizer, config=EngineConfig(deterministic=True))
    wanted = plain.generate([text], params)[0]
    llm = LLM(
        trained_model.model,
        tokenizer=trained_model.tokenizer,
        config=EngineConfig(num_drafts=2, deterministic=True),
    )
    cold = llm.generate([text * 8], params)[0], llm.engine.draft_acceptance
    assert llm.generate([text], params)[0].token_ids == wanted.token_ids
    assert llm.engine.draft_acceptance is not None and cold[1] is not None and cold[1] > 0.15


def test_completions_of_one_prompt_share_it_and_differ(model: Transformer) -> None:
    llm = LLM(model)
    (prompt,) = prompts((100,))
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=16)
    output = llm.generate([prompt], params)[0]
    texts = [each.token_ids for each in output.outputs]
    assert len(set(texts)) == 3
    assert LLM(model).generate([prompt], replace(params, n=1))[0].token_ids == texts[0]
    best = llm.generate([prompt], SamplingParams(temperature=1.0, seed=7, n=1, best_of=3, max_tokens=16, logprobs=0))[0]
    ranked = llm.generate([prompt], SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=16, logprobs=0))[0]
    means = [sum(t.logprob for t in each.logprobs or ()) for each in ranked.outputs]
    assert best.token_ids == ranked.outputs[means.index(max(means))].token_ids
    llm.engine.scheduler.check()


def test_bad_requests_fail_alone(model: Transformer) -> None:
    llm = LLM(model)
    good = prompts((9,))[0]
    params = SamplingParams(temperature=0, max_tokens=4)
    outputs = llm.generate([good, [], [40], good * 60, good], params)
    assert [output.error is None for output in outputs] == [True, False, False, False, True]
    assert "holds no token" in (outputs[1].error or "") and "outside the vocabulary" in (outputs[2].error or "")
    assert "max_positions" in (outputs[3].error or "") and outputs[3].finish_reason == "error"
    assert outputs[0].token_ids == outputs[4].token_ids and len(outputs[0].token_ids) == 4
    with pytest.raises(ValueError, match="has no tokenizer; give token ids"):
        llm.generate("text")
    with pytest.raises(ValueError, match="num_drafts: 1 tokens cannot be drafted by a model without MTP"):
        LLM(random_model(replace(SPEC, mtp_depth=0)), config=EngineConfig(num_drafts=1))


def test_outputs_come_as_they_end_and_a_reader_may_leave(model: Transformer) -> None:
    llm = LLM(model)
    asked, params = (
        prompts((9, 5)),
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (9, 2)],
    )
    wanted = tokens_of(llm.generate(asked, params))
    found = [(number, output.token_ids) for number, output in llm.as_finished(asked, params)]
    assert found == [(1, wanted[1]), (0, wanted[0])]
    for reader in (llm.as_finished(asked, params), llm.stream(asked[0], params[0])):
        next(reader)
        assert llm.engine.unfinished
        reader.close()
        assert not llm.engine.unfinished
        llm.engine.scheduler.check()
    assert tokens_of(llm.generate(asked, params)) == wanted


def test_calls_may_take_turns(model: Transformer) -> None:
    """Whichever takes a step takes it for all; one that is closed ends its own requests alone."""
    llm = LLM(model)
    asked, params = prompts((9, 5, 7)), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    wanted = tokens_of(llm.generate(asked, params))
    first, second, listed = llm.stream(asked[0], params), llm.stream(asked[1], params), llm.as_finished(asked, params)
    found = [(next(first), next(second)) for _ in range(4)]
    assert all(not each.finished for pair in found for each in pair)
    assert llm.generate(asked, params)[2].token_ids == wanted[2]
    assert [next(first).token_ids, *(each.token_ids for each in first)] == [wanted[0]]
    assert [each.token_ids for each in second] == [wanted[1]]
    leaver, stayer = llm.stream(asked[2], params), llm.stream(asked[0], params)
    for reader in (stayer, leaver):
        next(reader)
    ended = [next(listed)]
    leaver.close()
    assert list(stayer)[-1].token_ids == wanted[0]
    ended += listed
    assert {number: output.token_ids for number, output in ended} == dict(enumerate(wanted))
    assert not llm.engine.unfinished and not llm._news


def test_a_call_says_that_the_engine_fell_asleep(model: Transformer) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for call in (LLM.stream, LLM.as_finished):
        llm = LLM(model)
        reader = call(llm, prompts((9,))[0], params)
        other = llm.stream(prompts((5,))[0], params)
        for _ in range(2):
            next(other)
        llm.engine.sleep()
        with pytest.raises(ValueError, match="is asleep"):
            next(reader)
        llm.engine.wake()
        assert len(list(other)[-1].token_ids) == 9 and not llm.engine.unfinished


def test_steps_that_somebody_else_takes_are_told_of(model: Transformer) -> None:
    llm = LLM(model)
    stream = llm.stream(prompts((9,))[0], SamplingParams(temperature=0, max_tokens=4))
    next(stream)
    while llm.engine.unfinished:
        llm.engine.step()
    with pytest.raises(RuntimeError, match="leave the steps to them"):
        next(stream)
    assert not llm._news


def test_a_prompt_may_be_any_row_of_whole_numbers(model: Transformer) -> None:
    llm, (tokens, more) = LLM(model), prompts((5, 9))
    params = SamplingParams(temperature=0, max_tokens=3)
    wanted = llm.generate([tokens, more], params)
    given: Any
    for given in (tuple(tokens), np.array(tokens), list(np.array(tokens)), torch.tensor(tokens), array("i", tokens)):
        assert tokens_of(llm.generate(given, params)) == [wanted[0].token_ids]
    several: Any
    for several in (iter([tokens, more]), [np.array(tokens), torch.tensor(more)]):
        assert tokens_of(llm.generate(several, params)) == tokens_of(wanted)
    several = torch.tensor([[3], [4]])
    assert [output.prompt_ids for output in llm.generate(several, params)] == [(3,), (4,)]
    assert "is bytes; decode it to text" in (llm.generate(b"abc", params)[0].error or "")


def test_experts_are_returned_for_each_token(model: Transformer) -> None:
    (prompt,) = prompts((9,))
    output = LLM(model).generate([prompt], SamplingParams(temperature=0, max_tokens=5, return_experts=True))[0]
    experts_TLK = output.outputs[0].experts
    assert experts_TLK.shape == (9 + 4, 1, 2)  # the last token sampled is never computed
    with torch.no_grad():
        step = model.step(_packed(prompt))
        model.hidden(torch.tensor(prompt), step)
    assert (experts_TLK[:9, 0] == step.routings[1].expert_ids_TK.numpy()).all()


def _packed(prompt: list[int]):
    from abyssal.model.context import PackedBatch

    return PackedBatch([len(prompt)])


def test_echo_puts_the_prompt_before_the_text(trained_model) -> None:
    llm = LLM(trained_model.model, tokenizer=trained_model.tokenizer)
    text = "import os\n"
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1)
    plain = llm.generate([text], params)[0]
    echoed = llm.generate([text], replace(params, echo=True))[0]
    assert (echoed.text, echoed.prompt) == (text + plain.text, text)
    assert (echoed.token_ids, echoed.prompt_logprobs) == (plain.token_ids, plain.prompt_logprobs)
    *_, last = llm.stream(text, replace(params, echo=True))
    assert last.text == echoed.text
    by_tokens = llm.generate([list(plain.prompt_ids)], replace(params, echo=True))[0]
    assert by_tokens.text == trained_model.tokenizer.decode(plain.prompt_ids) + plain.text
