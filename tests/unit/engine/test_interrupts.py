"""Ctrl-C at any moment of a step leaves an engine that goes on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.interrupts import unbroken
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from tests.support.checkpoints import SMALL, random_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5] * 100, [7, 8, 9], [4] * 50]


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
