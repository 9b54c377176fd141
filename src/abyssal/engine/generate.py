"""Text from one prompt: expanded attention over the prompt, absorbed attention for each new token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from abyssal.cache.latent import LatentCache
from abyssal.engine.sampler import check_sampling, sample
from abyssal.model.transformer import ACTIVATION_DTYPES, Transformer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` new token ids as they are made; an end-of-sequence id is yielded, then it stops.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, sampling values out of range, or a prompt and
            ``max_tokens`` that together are longer than the model.
    """
    check_sampling(temperature, top_p)
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} must be at least 1")
    if not prompt_ids:
        raise ValueError("prompt: holds no token; give some text, or the tokenizer's begin-of-sequence token")
    if len(prompt_ids) + max_tokens > model.spec.max_positions:
        raise ValueError(
            f"prompt: its {len(prompt_ids)} tokens and max_tokens {max_tokens} are together past the model's "
            f"max_positions {model.spec.max_positions}; shorten the prompt or ask for fewer tokens"
        )
    weight = model.embed.weight
    tokens_T = torch.tensor(list(prompt_ids), dtype=torch.long, device=weight.device)
    model.check_tokens(tokens_T[None])
    dtype = ACTIVATION_DTYPES.get(model.recipe.activations, weight.dtype)
    cache = LatentCache(model.spec, len(tokens_T) + max_tokens, dtype, weight.device)
    return _tokens(model, cache, tokens_T, max_tokens, temperature, top_p, generator)


def _tokens(
    model: Transformer,
    cache: LatentCache,
    tokens_T: torch.Tensor,
    max_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Iterator[int]:
    dispatcher = model.local_dispatcher()
    end = model.spec.eos_token_id
    ends = set(end) if isinstance(end, tuple) else {end}
    for index in range(max_tokens):
        with torch.inference_mode():
            step = model.step(cache.extend(len(tokens_T), absorbed=index > 0), dispatcher)
            hidden_TD = model.hidden(tokens_T, step)
            token = sample(model.logits(hidden_TD[-1:])[0], temperature, top_p, generator)
        yield token
        if token in ends:
            return
        tokens_T = tokens_T.new_tensor([token])
