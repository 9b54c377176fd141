"""Decoding one prompt: greedy is the plain forward's argmax; sampling is seeded and keeps to its nucleus."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from abyssal.engine.generate import generate
from abyssal.engine.sampler import sample
from abyssal.model.attention import LatentAttention
from tests.support.parity import draw_spec, random_model, random_tokens


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_greedy_tokens_are_those_of_the_plain_forward(family: str) -> None:
    spec = draw_spec(family, 2)  # type: ignore[arg-type]
    model = random_model(spec, 2, torch.float64)
    prompt = random_tokens(spec, 1, 6)[0].tolist()
    expected = list(prompt)
    while len(expected) < 22 and (len(expected) == 6 or expected[-1] != spec.eos_token_id):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, prompt, 16)) == expected[6:]


def test_only_the_prompt_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding in the expanded form would write the same text, ever more slowly."""
    rows: list[int] = []
    expanded = LatentAttention._expanded

    def record(self: LatentAttention, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(q))
        return expanded(self, q, *rest)

    monkeypatch.setattr(LatentAttention, "_expanded", record)
    model = random_model(draw_spec("deepseek_v3", 2))
    assert len(list(generate(model, [5, 6, 7], 4))) > 1
    assert rows == [3] * model.spec.num_layers


def test_generation_ends_after_an_end_token() -> None:
    spec = draw_spec("deepseek_v3", 2)
    model = random_model(spec, 2)
    prompt = random_tokens(spec, 1, 6)[0].tolist()
    free = list(generate(model, prompt, 8))
    model.spec = replace(spec, eos_token_id=(spec.vocab_size - 1, free[3]))
    assert list(generate(model, prompt, 8)) == free[: free.index(free[3]) + 1]


def test_sampling_is_seeded() -> None:
    spec = draw_spec("deepseek_v3", 2)
    model = random_model(spec, 2)

    def draw(seed: int) -> list[int]:
        return list(generate(model, [5, 6, 7], 12, 1.5, 0.95, torch.Generator().manual_seed(seed)))

    assert draw(0) == draw(0)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(logits, 1.0, 0.75, generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert {sample(logits, 1.0, 1e-6, generator) for _ in range(20)} == {0}
    assert {sample(logits, 1.0, 1.0, generator) for _ in range(400)} == {0, 1, 2, 3}
    assert sample(logits, 0.0, 1.0) == 0


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.tensor([1.0, 50.0, 2.0])
    assert [sample(logits, temperature, 0.9) for temperature in (1e-3, 1e-37, 1e-300)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": 126}, "prompt: its 3 tokens and max_tokens 126 .*max_positions 128"),
        ({"max_tokens": 4, "temperature": -1.0}, "temperature: -1.0"),
        ({"max_tokens": 4, "top_p": 0.0}, "top_p: 0.0"),
        ({"max_tokens": 4, "prompt_ids": []}, "prompt: holds no token"),
        ({"max_tokens": 4, "prompt_ids": [100000]}, "outside the vocabulary"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(options: dict, message: str) -> None:
    model = random_model(draw_spec("llama", 2))
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt_ids": [2, 3, 4], **options})
