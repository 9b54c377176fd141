"""What is told of requests step by step, put together, is what the engine says of them at their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.deltas import DeltaTeller
from abyssal.engine.messages import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from abyssal.engine.wire import Delta
from tests.support.trained_model import TrainedModel

PROMPTS = ("import os\n", "def main(self):\n    return", "class", "the " * 40)
CONFIG = EngineConfig(cache_tokens=4096, prefix_cache=False, token_budget=64)


@dataclass
class Joined:
    """One completion's deltas, put together."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    discarded_tokens: int = 0
    error: str = ""
    deltas: int = 0

    def add(self, delta: Delta) -> None:
        assert self.finish_reason is None, "something was told of a completion that had ended"
        assert self.deltas == 0 or delta.prompt_logprobs is None
        assert delta.token_ids or delta.finish_reason is not None, "nothing is new"
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.cached_tokens, self.discarded_tokens = delta.cached_tokens, delta.discarded_tokens
        self.error = delta.error
        self.deltas += 1


def joined(output: RequestOutput) -> dict[int, Joined]:
    """The completions of an output, as their deltas should come to."""
    return {
        each.index: Joined(
            each.text,
            each.token_ids,
            each.logprobs or (),
            output.prompt_logprobs,
            each.finish_reason,
            each.stop_reason,
            each.cached_tokens,
            0 if each.index else output.discarded_tokens,
            (output.error or "") if each.finish_reason == "error" else "",
        )
        for each in output.outputs
    }


@dataclass
class Run:
    """Requests run to their end, cancelled after so many steps."""

    requests: Sequence[SamplingParams]
    cancel_after: Sequence[int | None]
    told: dict[int, dict[int, Joined]] = field(default_factory=dict)
    ended: dict[int, RequestOutput] = field(default_factory=dict)

    def run(self, engine: Engine, tell: bool) -> Run:
        teller, steps = DeltaTeller(), 0
        for number, params in enumerate(self.requests):
            prompt = PROMPTS[number % len(PROMPTS)]
            assert engine._tokenizer is not None
            engine.add(Request(number, tuple(engine._tokenizer.encode(prompt)), params))
        while len(self.ended) < len(self.requests):
            for number, after in enumerate(self.cancel_after):
                if after == steps:
                    engine.cancel(number)
            outputs = engine.step()
            for delta in teller.tell(outputs) if tell else ():
                completions = self.told.setdefault(delta.request_id, {})
                completions.setdefault(delta.index, Joined()).add(delta)
            self.ended.update({output.request_id: output for output in outputs if output.finished})
            steps += 1
        assert not engine.unfinished and not teller._told
        return self


@st.composite
def parameters(draw: st.DrawFn) -> SamplingParams:
    n = draw(st.integers(1, 3))
    most = draw(st.integers(1, 14))
    return SamplingParams(
        temperature=0.8,
        seed=draw(st.integers(0, 1 << 40)),
        max_tokens=most,
        min_tokens=draw(st.integers(0, most)),
        stop=tuple(draw(st.lists(st.sampled_from(["e", "in", "se", "\n    ", "self.", "(", " =", "é"]), max_size=3))),
        stop_token_ids=tuple(draw(st.lists(st.integers(260, 400), max_size=3))),
        include_stop=draw(st.booleans()),
        n=n,
        best_of=draw(st.none() | st.integers(n, 4)),
        logprobs=draw(st.none() | st.integers(0, 2)),
        prompt_logprobs=draw(st.none() | st.integers(0, 2)),
    )


@pytest.fixture(scope="module")
def engines(trained_model: TrainedModel) -> dict[int, tuple[Engine, Engine]]:
    """By drafts: one that is told of, one that is not."""

    def engine(num_drafts: int) -> Engine:
        config = EngineConfig(**{**vars(CONFIG), "num_drafts": num_drafts})
        return Engine(trained_model.model, trained_model.tokenizer, config)

    return {num_drafts: (engine(num_drafts), engine(num_drafts)) for num_drafts in (0, 2)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_deltas_come_to_the_output(engines: dict[int, tuple[Engine, Engine]], data: st.DataObject) -> None:
    requests = data.draw(st.lists(parameters(), min_size=1, max_size=4))
    count = len(requests)
    cancel_after = data.draw(st.lists(st.none() | st.integers(0, 8), min_size=count, max_size=count))
    ours, plain = engines[data.draw(st.sampled_from([0, 2]))]
    run = Run(requests, cancel_after).run(ours, tell=True)
    alone = Run(requests, cancel_after).run(plain, tell=False)
    for number, output in alone.ended.items():
        told = run.told[number]
        for each in told.values():
            each.deltas = 0
        assert told == joined(output)


def test_a_delta_a_step(engines: dict[int, tuple[Engine, Engine]]) -> None:
    """And what is ranked at the end alone, with what was thrown away."""
    plain = SamplingParams(temperature=0.8, seed=1, max_tokens=9, ignore_eos=True)
    ranked = SamplingParams(temperature=0.8, seed=1, max_tokens=9, ignore_eos=True, n=1, best_of=3)
    run = Run([plain, ranked], [None, None]).run(engines[0][0], tell=True)
    assert run.told[0][0].deltas == 9
    assert run.told[1][0].deltas == 1 and run.told[1].keys() == {0}
    assert run.told[1][0].discarded_tokens == 18


def test_a_step_that_fails_is_told_as_an_error(
    engines: dict[int, tuple[Engine, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, teller = engines[0][0], DeltaTeller()
    engine.add(Request(1, (5, 6), SamplingParams(temperature=0.8, seed=1, max_tokens=9, n=2)))
    deltas = teller.tell(engine.step())

    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "launch", fail)
        with pytest.raises(RuntimeError):
            engine.step()
    last = teller.tell(engine.step())
    assert [len(delta.token_ids) for delta in deltas] == [1, 1]
    assert [(delta.index, delta.token_ids, delta.finish_reason) for delta in last] == [
        (0, (), "error"),
        (1, (), "error"),
    ]
    assert all("broken" in delta.error for delta in last)
