"""The engine's greedy tokens are those of transformers' ``generate``, for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from abyssal.spec.model import Family
from tests.support.parity import draw_spec, in_transformers, random_model, random_tokens

LENGTHS, NEW_TOKENS = (1, 9, 70, 64), 16
LEAST_MARGIN = 1e-3
"""Of the best logit over the second, relative to the best's size; below, rounding may choose."""


def greedy(theirs: Any, prompt: list[int]) -> tuple[list[int], int]:
    """Their new tokens, and how many of them rounding cannot change."""
    found = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits)[:, 0].topk(2).values
    close = ((best[:, 0] - best[:, 1]) < LEAST_MARGIN * best[:, 0].abs()).nonzero().flatten().tolist()
    return found.sequences[0, len(prompt) :].tolist(), close[0] if close else len(best)


@pytest.mark.parametrize(("family", "seed"), [("deepseek_v3", 1), ("deepseek_v3", 4), ("deepseek_v2", 1), ("llama", 5)])
def test_greedy_tokens_are_theirs(family: Family, seed: int, tmp_path: Path) -> None:
    """Prompts of several lengths at once, read whole or in chunks mixed with decoding, and again from cached pages."""
    spec = replace(draw_spec(family, seed), max_positions=160)
    model = random_model(spec, seed)
    theirs = in_transformers(model, tmp_path / "saved")
    prompts = [random_tokens(spec, 1, length, length)[0].tolist() for length in LENGTHS]
    expected = [greedy(theirs, prompt) for prompt in prompts]
    assert sum(certain for _, certain in expected) > 0.8 * sum(len(tokens) for tokens, _ in expected)

    for config in (EngineConfig(), EngineConfig(token_budget=16, max_sequences=8)):
        llm = LLM(model, config=config)
        for cached in (0, 64):
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
            for output, (tokens, certain) in zip(outputs, expected, strict=True):
                assert list(output.token_ids[:certain]) == tokens[:certain]
                assert certain < len(tokens) or list(output.token_ids) == tokens
            assert outputs[2].cached_tokens == cached
