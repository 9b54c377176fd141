"""Ctrl-C at any moment of a step leaves an engine that goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.interrupts import unbroken
from abyssal.engine.llm import LLM
from abyssal.engine.messages import Request, RequestOutput, SamplingParams
from tests.support.checkpoints import SMALL, random_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5] * 100, [7, 8, 9], [4] * 50]


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """Whoever runs the tests in the background may have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["_shares.tick", "_memory.publish", "_take", "_charge"])
def test_it_waits_for_the_steps_end(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a plan, and of what becomes of its results."""
    llm = LLM(random_model(replace(SMALL, max_positions=256)), config=EngineConfig(token_budget=16, max_sequences=4))
    wanted = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
    owner, _, name = f"scheduler.{moment}".rpartition(".")
    target: Any = llm.engine
    for part in owner.split("."):
        target = getattr(target, part)
    function, calls = getattr(target, name), 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            press()
        return function(*arguments)

    monkeypatch.setattr(target, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    llm.engine.scheduler.check()
    assert calls >= 2 and not llm.engine.unfinished and not llm._news
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == wanted


@pytest.mark.parametrize("moment", ["_shares.tick", "_memory.publish", "_take", "_charge", "_accept", "_end"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_what_breaks_a_step_off_anywhere_leaves_an_engine_that_goes_on(
    moment: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C, or a mistake of ours, in the middle of a plan or of what becomes of its results."""
    config = EngineConfig(token_budget=16, max_sequences=4, cache_tokens=320)
    engine = Engine(random_model(replace(SMALL, max_positions=256)), config=config)
    requests = [Request(number, tuple(prompt), GREEDY) for number, prompt in enumerate(PROMPTS)]
    wanted = _outputs(engine, requests)
    owner, _, name = f"scheduler.{moment}".rpartition(".")
    target: Any = engine
    for part in owner.split("."):
        target = getattr(target, part)
    function, calls = getattr(target, name), 0

    def broken_off(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*arguments)
        if calls == call:
            raise KeyboardInterrupt("now")
        return result

    with monkeypatch.context() as patched:
        patched.setattr(target, name, broken_off)
        for request in requests:
            engine.add(request)
        ended: list[RequestOutput] = []
        with pytest.raises(KeyboardInterrupt, match="now"):
            while engine.unfinished:
                ended += [output for output in engine.step() if output.finished]
    engine.scheduler.check()
    assert not engine.unfinished and engine.scheduler is not target
    with pytest.raises(ValueError, match="still under way"):
        engine.add(
            Request(next(r.request_id for r in requests if r.request_id not in {e.request_id for e in ended}), (3,))
        )
    told = engine.step()
    assert {output.request_id for output in [*ended, *told]} == {0, 1, 2} and len(ended) + len(told) == 3
    assert all(output.finished for output in told)
    assert all("failed: KeyboardInterrupt now" in (output.error or "") for output in told if output.error)
    assert _outputs(engine, requests) == wanted


def _outputs(engine: Engine, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    for request in requests:
        engine.add(request)
    done: dict[int, tuple[int, ...]] = {}
    while engine.unfinished:
        done.update((output.request_id, output.token_ids) for output in engine.step() if output.finished)
        engine.scheduler.check()
    return done


def test_a_second_one_breaks_off() -> None:
    reached = 0
    with pytest.raises(KeyboardInterrupt), unbroken():
        press()
        reached = 1
        press()
        reached = 2
    assert reached == 1


def test_a_handler_of_somebody_elses_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with unbroken():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            press()
    finally:
        signal.signal(signal.SIGINT, before)
