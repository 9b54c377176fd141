"""Drafts are what the MTP modules say of the whole text, however the engine came by it; and when they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from abyssal.cache.pages import PAGE
from abyssal.checkpoint.hf import save_model
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.gain import DraftStatistics
from abyssal.engine.llm import LLM
from abyssal.engine.messages import Request, SamplingParams, StepPlan
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL, random_model

SPEC = replace(SMALL, max_positions=512)
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


@torch.no_grad()
def drafts_from_scratch(model: Transformer, tokens: list[int], count: int) -> tuple[int, ...]:
    """Greedy drafts after ``tokens``, of which the last was just sampled, from whole sequences without a cache."""
    known = len(tokens) - 1
    hidden_TD = model.hidden(torch.tensor(tokens[:-1]), model.step(PackedBatch([known])))
    text, inputs_TD = list(tokens), hidden_TD
    for depth in range(len(model.mtp)):
        inputs_TD = hidden_TD
        hidden_TD = mtp(model, depth, text[depth + 1 :][:known], inputs_TD)
        text.append(int(model.logits(hidden_TD[-1:]).argmax()))
    while len(text) < len(tokens) + count:
        inputs_TD = torch.cat([inputs_TD, hidden_TD[-1:]])
        depth = len(model.mtp) - 1
        hidden_TD = mtp(model, depth, text[depth + 1 :][: len(inputs_TD)], inputs_TD)
        text.append(int(model.logits(hidden_TD[-1:]).argmax()))
    return tuple(text[len(tokens) :][:count])


def mtp(model: Transformer, depth: int, following: list[int], hidden_TD: torch.Tensor) -> torch.Tensor:
    return model.mtp_hidden(depth, torch.tensor(following), hidden_TD, model.step(PackedBatch([len(following)])))


class Turns:
    """In place of the measured gain: when to draft is said beforehand."""

    def __init__(self, most: Callable[[int], int]) -> None:
        self.steps = 0
        self._most = most

    def begin(self, num_sequences: int) -> int:
        self.steps += 1
        return self._most(self.steps)

    def end(self, plan: StepPlan, results: object) -> None:
        pass


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("num_drafts", "most"),
    [(1, lambda step: 1), (2, lambda step: 2), (4, lambda step: 4), (3, lambda step: 3 * (step % 20 < 3))],
    ids=["one", "two", "past the depth", "off and on"],
)
def test_drafts_are_those_of_the_whole_text(depth: int, num_drafts: int, most: Callable[[int], int]) -> None:
    """With prompts in chunks beside others, over page borders, and after a time without drafting."""
    model = random_model(replace(SPEC, mtp_depth=depth), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    config = EngineConfig(num_drafts=num_drafts, deterministic=True, token_budget=48, max_sequences=4)
    engine = Engine(model, config=config)
    engine._gain = Turns(most)  # type: ignore[assignment]
    for number, length in enumerate((61, 3, 100)):
        engine.add(Request(number, prompt(length, number), replace(GREEDY, max_tokens=50)))
    compared = 0
    while engine.unfinished:
        engine.step()
        for live in engine._live.values():
            if live.drafts and (num_drafts == 3 or len(live.tokens) % 3 == 0):
                assert live.drafts == drafts_from_scratch(model, live.tokens, len(live.drafts)), len(live.tokens)
                compared += len(live.drafts) == num_drafts
    assert compared > 12


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "most", [lambda step: 3, lambda step: 3 * (step % 20 < 3), lambda step: 0], ids=["on", "off and on", "off"]
)
def test_pages_hold_the_modules_entries_of_the_text(depth: int, most: Callable[[int], int]) -> None:
    """As if all of it had been the prompt: nothing made with a rejected draft stays, and nothing is left out.

    At a page's end the second module has to guess a token; while drafting is off, the guess stands for a page.
    """
    model = random_model(replace(SPEC, mtp_depth=depth), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    config = EngineConfig(num_drafts=3, deterministic=True)
    engine = Engine(model, config=config)
    engine._gain = Turns(most)  # type: ignore[assignment]
    engine.add(Request(0, prompt(61), replace(GREEDY, max_tokens=80)))
    tokens, pages = [], []
    while engine.unfinished:
        tokens, pages = list(engine._live[0].tokens), list(engine.scheduler.sequences[0].pages)
        engine.step()
    whole = Engine(model, config=config)
    whole.add(Request(0, tuple(tokens), replace(GREEDY, max_tokens=2)))
    whole.step()
    assert len(tokens) > 130
    for found, wanted in zip(pages[:2], whole.scheduler.sequences[0].pages, strict=False):
        of_modules = slice(model.spec.num_layers, None)
        found_LSX, wanted_LSX = (
            each._runner._cache.entries_PLSX[page, of_modules] for each, page in ((engine, found), (whole, wanted))
        )
        known = slice(0, PAGE - depth + 1)
        torch.testing.assert_close(found_LSX[:, known], wanted_LSX[:, known], rtol=1e-9, atol=1e-9)


def acceptance(trained_model, text: str, config: EngineConfig) -> DraftStatistics:
    llm = LLM(trained_model.model, tokenizer=trained_model.tokenizer, config=config)
    llm.generate(text, GREEDY)
    return llm.engine.draft_statistics


def test_acceptance_by_position_does_not_depend_on_chunks(trained_model) -> None:
    text = "def read(self, size=-1):\n    " * 8
    whole = acceptance(trained_model, text, EngineConfig(num_drafts=3, deterministic=True))
    chunked = EngineConfig(num_drafts=3, deterministic=True, token_budget=17, max_sequences=4)
    assert acceptance(trained_model, text, chunked) == whole
    first, second, third = whole.acceptance
    assert first > 0.3 and first >= second >= third
    assert whole.tokens_per_step == pytest.approx(1 + sum(whole.accepted) / whole.drafted[0])
    assert whole.tokens_per_step > 1.3


def test_drafting_is_turned_off_and_on_by_its_gain_and_changes_no_token(trained_model) -> None:
    texts = ["def read(self, size=-1):\n    " * 3, "class Message:\n    "]
    params = SamplingParams(temperature=0, max_tokens=220, ignore_eos=True)
    plain = LLM(trained_model.model, tokenizer=trained_model.tokenizer, config=EngineConfig(deterministic=True))
    wanted = [output.token_ids for output in plain.generate(texts, params)]
    for cost, stays in ((1.01, True), (3.0, False)):
        now = [0.0]
        config = EngineConfig(num_drafts="auto", deterministic=True)
        engine = Engine(trained_model.model, trained_model.tokenizer, config, clock=lambda now=now: now[0])
        launch, verified = engine._runner.launch, []

        def timed(plan: StepPlan, now=now, cost=cost, launch=launch, verified=verified):
            now[0] += cost if plan.wanted_drafts else 1.0
            verified.append(any(chunk.num_drafts for chunk in plan.chunks))
            return launch(plan)

        engine._runner.launch = timed
        for number, text in enumerate(texts):
            prompt_ids = plain.tokenizer.encode(text, add_bos=True)  # type: ignore[union-attr]
            engine.add(Request(number, tuple(prompt_ids), params))
        outputs = {}
        while engine.unfinished:
            outputs |= {output.request_id: output.token_ids for output in engine.step() if output.finished}
        assert [outputs[0], outputs[1]] == wanted
        assert (sum(verified[-100:]) > 50) is stays
        assert (engine.draft_gains[2] > 1) is stays
        assert len(engine.draft_statistics.drafted) == 1, "as many as there are modules"


def test_what_num_drafts_may_be() -> None:
    without = random_model(replace(SPEC, mtp_depth=0))
    assert LLM(without, config=EngineConfig(num_drafts="auto")).engine.draft_statistics == DraftStatistics((), ())
    for wrong, message in (("always", "'auto'"), (-1, "at least 0"), (2, "without MTP")):
        model = without if wrong == 2 else random_model(SPEC)
        with pytest.raises(ValueError, match=f"num_drafts: .*{message}"):
            Engine(model, config=EngineConfig(num_drafts=wrong))  # type: ignore[arg-type]


def test_modules_are_loaded_where_drafts_are_wanted(trained_model, tmp_path) -> None:
    without = tmp_path / "without"
    save_model(trained_model.model, without, "fp32", include_mtp=False)
    for folder, num_drafts, modules in (
        (trained_model.folder, 0, 0),
        (trained_model.folder, 1, 1),
        (trained_model.folder, "auto", 1),
        (without, "auto", 0),
    ):
        llm = LLM(folder, tokenizer=trained_model.tokenizer, config=EngineConfig(num_drafts=num_drafts))  # type: ignore[arg-type]
        assert len(llm.model.mtp) == modules
