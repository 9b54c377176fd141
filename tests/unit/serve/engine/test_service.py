"""Requests through the engine's own process, on a trained model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import State
from tests.support.engine_service import ORIGIN, RunningService, collect, prepared, until
from tests.support.trained_model import TrainedModel

PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True)
ENDLESS = replace(PARAMS, max_tokens=900)
OPTIONS = {"cache_tokens": 64 * 64, "num_drafts": 1}


@pytest.fixture(scope="module")
def running(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("disk") / "pages"
    running = RunningService(trained_model.folder, disk_cache_folder=str(folder), **OPTIONS)
    running.ready()
    yield running
    running.close()


@pytest.fixture(scope="module")
def llm(trained_model: TrainedModel) -> LLM:
    return LLM(trained_model.model, tokenizer=trained_model.tokenizer, config=EngineConfig(**OPTIONS))


def prompt_of(trained: TrainedModel, text: str) -> tuple[int, ...]:
    return tuple(trained.tokenizer.encode(text))


def test_what_is_served(running: RunningService, trained_model: TrainedModel) -> None:
    served = running.service.served
    assert running.service.state is State.READY
    assert (served.name, served.max_length, served.vocab_size) == ("served", 1024, 1024)
    assert served.ends == (trained_model.tokenizer.eos_token_id,)
    assert served.fingerprint.startswith("fp_") and len(served.fingerprint) == 13
    assert served.decode(served.encode("def f(x):")) == "def f(x):"


def test_answers_are_those_of_the_offline_engine(
    running: RunningService, llm: LLM, trained_model: TrainedModel
) -> None:
    """Several prompts and choices, with everything that can be asked of them."""
    prompts = [prompt_of(trained_model, text) for text in ("import os\n", "def main(self):\n    return")]
    params = replace(PARAMS, n=2, logprobs=2, prompt_logprobs=1, stop=("\n\n", "self"))
    found = running.answer(prepared(prompts, params))
    wanted = llm.generate(prompts, params)
    assert len(found) == 4
    for number, output in enumerate(wanted):
        for each in output.outputs:
            event = found[number * 2 + each.index]
            assert event == EngineEvent(
                number,
                each.index,
                each.text,
                each.token_ids,
                each.logprobs or (),
                output.prompt_logprobs,
                each.finish_reason,
                each.stop_reason,
                each.cached_tokens,
            )


def test_ranked_choices_come_at_the_end(running: RunningService, llm: LLM, trained_model: TrainedModel) -> None:
    prompt = prompt_of(trained_model, "class Reader:\n")
    params = replace(PARAMS, n=2, best_of=4)
    found = running.answer(prepared([prompt], params))
    (wanted,) = llm.generate([prompt], params)
    assert [found[index].token_ids for index in (0, 1)] == [each.token_ids for each in wanted.outputs]
    assert found[0].discarded_tokens == wanted.discarded_tokens == 48


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (replace(PARAMS, n=65), "n"),
        (replace(PARAMS, structured=StructuredOutput("regex", "(")), "structured"),
        (replace(PARAMS, structured=StructuredOutput("json_schema", {"maximum": 1 << 70})), None),
        (replace(PARAMS, stop=("\ud800",)), None),
    ],
)
def test_what_cannot_be_met_is_refused(running: RunningService, params: SamplingParams, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        running.answer(prepared([(5, 6)], params))
    assert caught.value.status == 422
    assert param is None or (caught.value.param or "").startswith(param)
    assert running.answer(prepared([(5, 6)], replace(PARAMS, max_tokens=1)))[0].finish_reason == "length"


def test_one_bad_prompt_ends_its_request_alone(running: RunningService) -> None:
    async def both() -> list[object]:
        good, bad = prepared([(5, 6)], PARAMS), prepared([(5, 6), (5000,), (7,)], PARAMS)
        answers = [collect(running.service, request) for request in (good, bad)]
        return await asyncio.gather(*answers, return_exceptions=True)

    good, bad = running.run(both())
    assert isinstance(good, dict) and good[0].finish_reason == "length"
    assert isinstance(bad, ApiError) and "5000" in bad.message
    assert running.service.num_running == 0


def test_leaving_frees_pages_at_once(running: RunningService) -> None:
    async def leave() -> tuple[int, int]:
        before = running.service.statistics.output_tokens
        events = running.service.run(prepared([(5, 6, 7), (8, 9)], replace(ENDLESS, n=2)), ORIGIN)
        async for _ in events:
            break
        await until(lambda: running.service.statistics.used_pages > 0)
        await events.aclose()
        await until(lambda: running.service.statistics.used_pages == 0, 5.0)
        assert running.service.num_running == 0
        return before, running.service.statistics.output_tokens

    before, after = running.run(leave())
    assert after - before < 4 * 700, "it was computed to its end"
    statistics = running.service.statistics
    assert (statistics.running, statistics.waiting) == (0, 0)


def test_a_slow_reader_holds_up_nobody(running: RunningService) -> None:
    """Its events are put together; what it reads in the end is whole."""

    async def read() -> tuple[list[EngineEvent], float]:
        slow = running.service.run(prepared([(5, 6)], replace(PARAMS, max_tokens=400)), ORIGIN)
        events = [await anext(slow)]
        begun = time.monotonic()
        quick = await collect(running.service, prepared([(5, 6)], PARAMS))
        seconds = time.monotonic() - begun
        assert quick[0].finish_reason == "length"
        await until(lambda: running.service.num_running == 0)
        events += [event async for event in slow]
        return events, seconds

    events, seconds = running.run(read())
    alone = running.answer(prepared([(5, 6)], replace(PARAMS, max_tokens=400)))
    assert sum((event.token_ids for event in events), ()) == alone[0].token_ids
    assert "".join(event.text for event in events) == alone[0].text
    assert len(events) <= 4 and seconds < 5.0
