"""Requests and limits that make no sense are refused, and what runs goes on."""

from __future__ import annotations

from typing import Any

import pytest

from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.messages import Request, SamplingParams
from tests.support.simulated_engine import SimulatedEngine


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request(1, ()), "prompt: holds no token"),
        (Request(1, (3,) * 300), "prompt: its 300 tokens .*max_positions 300"),
        (Request(1, (3,) * 256), "prompt: its 256 tokens .*4 pages hold 256 tokens"),
        (Request(1, (3, 40)), r"prompt: token 40 is outside the vocabulary of 40 tokens \(0..39\)"),
        (Request(1, (3, -1)), "prompt: token -1"),
        (Request(0, (3,)), "request_id: 0 is that of a request still under way"),
        (Request(1, (3,), SamplingParams(n=7)), "n: 7 completions .*max_sequences 6"),
        (Request(1, (3,), SamplingParams(n=2), prefill_only=True), "n: 2 completions cannot be split"),
        (Request(1, (3,), imported_tokens=1), "imported_tokens: 1 must be 0 or 0"),
        (Request(1, (3,), SamplingParams(max_tokens=1), output_ids=(4,)), "output_ids: 1 tokens leave none"),
    ],
)
def test_bad_requests_are_refused_and_others_go_on(wrong: Request, message: str) -> None:
    engine = SimulatedEngine(SchedulerConfig(max_positions=300, max_sequences=6, vocab_size=40), 4)
    engine.add(Request(0, (3,) * 20, SamplingParams(max_tokens=8, ignore_eos=True)))
    with pytest.raises(ValueError, match=message):
        engine.scheduler.add(wrong)
    engine.run()
    assert engine.ends[0, 0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 4, "max_sequences": 5}, "token_budget: 4 tokens .*max_sequences 5"),
        ({"save_every": 100}, "save_every: 100 must be a multiple of 64"),
        ({"max_sequences": 0}, "max_sequences: 0"),
        ({"num_drafts": -1}, "num_drafts: -1"),
        ({"preemption": "swap"}, "preemption: 'swap'"),
    ],
)
def test_contradictory_limits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**{"max_positions": 4096, **options})
