"""Requests through the engine's own process, on a trained model."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import State
from tests.support.engine_service import ORIGIN, RunningService, collect, newest_statistics, prepared, until
from tests.support.trained_model import TrainedModel

PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True)
ENDLESS = replace(PARAMS, max_tokens=900)
OPTIONS: dict[str, Any] = {"cache_tokens": 64 * 64, "num_drafts": 1}


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
            assert replace(event, began=None) == EngineEvent(
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


def test_statistics_are_what_was_done(running: RunningService, trained_model: TrainedModel) -> None:
    """Every token once, those of a prompt found in memory among them; nothing is under way afterwards."""
    before = running.run(newest_statistics(running.service))
    prompt = prompt_of(trained_model, "def statistics(self):\n    return self.count\n" * 12)
    answers = [
        running.answer(prepared([prompt, prompt[:70]], replace(PARAMS, n=2))),
        running.answer(prepared([prompt], replace(PARAMS, n=1, best_of=3))),
    ]
    after = running.run(newest_statistics(running.service))
    hits = answers[0][0].cached_tokens + answers[0][2].cached_tokens + answers[1][0].cached_tokens
    outputs = sum(len(event.token_ids) + event.discarded_tokens for answer in answers for event in answer.values())
    assert hits > len(prompt) - 64 and outputs == 24 * 7
    assert after.prompt_tokens - before.prompt_tokens == 2 * len(prompt) + 70
    assert after.memory_hit_tokens - before.memory_hit_tokens == hits
    assert after.disk_hit_tokens == before.disk_hit_tokens
    assert after.output_tokens - before.output_tokens == outputs
    assert after.steps > before.steps and after.step_seconds > before.step_seconds
    assert (after.running, after.waiting, after.used_pages, after.total_pages) == (0, 0, 0, 64)
    assert len(after.drafted) == 1 and 0 < after.accepted[0] < after.drafted[0]
    assert after.drafted[0] - before.drafted[0] <= outputs
    assert len(after.expert_loads) == 2
    assert all(len(loads) == 8 and sum(loads) == pytest.approx(1.0) for loads in after.expert_loads)


def test_a_trace_of_steps(running: RunningService) -> None:
    async def record() -> bytes:
        recording = asyncio.create_task(running.service.record(5, 30.0))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="being recorded"):
            await running.service.record(1, 1.0)
        await collect(running.service, prepared([(5, 6, 7)], replace(PARAMS, n=3)))
        return await recording

    events = json.loads(running.run(record()))["traceEvents"]
    steps = [event for event in events if event["name"] == "step"]
    assert [step["args"]["number"] for step in steps] == [0, 1, 2, 3, 4]
    first, second = steps[0]["args"], steps[1]["args"]
    assert (first["chunks"], first["prompt_tokens"], first["decode_tokens"]) == (1, 3, 0)
    assert (second["chunks"], second["prompt_tokens"], second["decode_tokens"]) == (3, 0, 3)
    for step in steps:
        inside = [each for each in events if each["ph"] == "X" and each is not step and _within(each, step)]
        assert [each["name"] for each in inside] == ["plan", "launch", "collect", "update", "send"]
        assert sum(each["dur"] for each in inside) == pytest.approx(step["dur"], abs=0.01)
    counters = {each["name"] for each in events if each["ph"] == "C"}
    assert counters == {"tokens", "sequences", "used pages"}
    assert any(each["name"] == "sequences" and each["args"]["running"] == 3 for each in events)


def _within(inner: dict[str, float], outer: dict[str, float]) -> bool:
    return outer["ts"] - 0.01 <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01


def test_a_trace_of_an_idle_engine_ends_with_its_time(running: RunningService) -> None:
    trace = json.loads(running.run(running.service.record(5, 0.1)))
    assert [event["ph"] for event in trace["traceEvents"]] == ["M", "M"]
    for steps, seconds in ((0, 1.0), (5, 0.0), (1 << 30, 1.0), (5, 1e9)):
        with pytest.raises(ApiError, match="A trace has 1 to"):
            running.run(running.service.record(steps, seconds))


def test_many_come_and_go(running: RunningService) -> None:
    """Whoever stays gets all of it; of whoever leaves, at any moment, nothing is left."""
    generator = random.Random(5)

    async def ask(number: int) -> bool:
        length = generator.randrange(1, 40)
        params = replace(PARAMS, n=generator.randrange(1, 3), seed=number, max_tokens=length)
        events = running.service.run(prepared([(5, number)], params), ORIGIN)
        leaves_after = generator.choice([None, generator.randrange(0, 2 * length)])
        found = 0
        async for event in events:
            found += len(event.token_ids)
            if leaves_after is not None and found >= leaves_after:
                break
        await events.aclose()
        return leaves_after is not None or found == params.n * length

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*(ask(number) for number in range(150)))

    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert all(running.run(all_of_them()))
    assert running.service.num_running == 0
    statistics = running.run(newest_statistics(running.service))
    assert (statistics.running, statistics.waiting, statistics.used_pages) == (0, 0, 0)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors
