"""transformers as its users run it: prefill, decoding, and static batching, each token's time noted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from support.peer import load_theirs
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

FORMS = ("eager", "grouped_mm", "batched_mm")
"""Its implementations of the experts."""


class _Clock(StoppingCriteria):
    """When each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load_peers(folder: Any, dtype: str) -> dict[str, Any]:
    """Each form's model, ready to be asked."""
    return {form: load_theirs(folder, dtype, form).eval() for form in FORMS}


@torch.inference_mode()
def generate_times(model: Any, tokens_BS: torch.Tensor, new_tokens: int, mask_BS: torch.Tensor | None = None) -> list:
    """Greedy decoding of exactly ``new_tokens``; seconds (``time.perf_counter``) at which each was there."""
    clock = _Clock()
    model.generate(
        tokens_BS,
        attention_mask=torch.ones_like(tokens_BS) if mask_BS is None else mask_BS,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert len(clock.times) == new_tokens, (len(clock.times), new_tokens)
    return clock.times


@torch.inference_mode()
def prefill_seconds(model: Any, tokens_1S: torch.Tensor) -> float:
    """Until the logits of the prompt's last token are there: the plain forward with a cache, which costs less than
    ``generate`` with one token."""
    start = time.perf_counter()
    logits = model(tokens_1S, use_cache=True, logits_to_keep=1).logits
    int(logits[0, -1].argmax())
    return time.perf_counter() - start


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask (B, S) of prompts of different lengths, each ending in the last column."""
    length = max(len(prompt) for prompt in prompts)
    tokens_BS = torch.zeros(len(prompts), length, dtype=torch.long)
    mask_BS = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BS[row, length - len(prompt) :] = 1
    return tokens_BS, mask_BS


def continuous_batching_refusal(model: Any) -> str | None:
    """Why transformers' own continuous batching (``generate_batch``) cannot serve this model here; None if it can.

    What it logs of the failure is swallowed.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import continuous_api

    config = GenerationConfig(do_sample=False, max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default it fills the machine's memory
    continuous_api.logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers = model.generate_batch([[2, 3, 4]], config, small, progress_bar=False, warmup=False)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    finally:
        continuous_api.logger.disabled = False
    failures = [str(answer.error) for answer in answers.values() if not answer.generated_tokens]
    return failures[0] if failures else None if answers else "no answer"
