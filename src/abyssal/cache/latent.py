"""A contiguous cache of one sequence: what each layer stores of each token, and the context that reads it.

For latent attention that is the normalised latent and the rotated key, ``kv_lora_rank + qk_rope_head_dim`` values a
token a layer, and nothing else [V3 section 2.1.1]; for the dense family, keys and values.

Legend: T tokens of a step, P capacity in tokens, X cached values of a token in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from abyssal.model.context import AttentionGroup, PagedStep
from abyssal.spec.model import ModelSpec


class LatentCache:
    """Entries of one sequence in every layer of the main model.

    Args:
        spec: the model.
        capacity: tokens that fit.
        dtype, device: of the entries; those of the model's activations.

    Raises:
        ValueError: a capacity past the model's length.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        if not 1 <= capacity <= spec.max_positions:
            raise ValueError(
                f"capacity: {capacity} tokens (prompt and new tokens together) must lie in 1..{spec.max_positions}, "
                "the model's max_positions; shorten the prompt or ask for fewer tokens"
            )
        shape = (capacity, spec.attention.cache_values)
        self._layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self.capacity = capacity
        self.device = torch.device(device)
        self.length = 0

    def store(self, layer: int, start: int, entries_TX: Tensor) -> None:
        self._layers[layer][start : start + len(entries_TX)] = entries_TX

    def read(self, layer: int, length: int) -> Tensor:
        """(length, X), a view."""
        return self._layers[layer][:length]

    def extend(self, num_tokens: int, absorbed: bool) -> CachedTokens:
        """The context of the next ``num_tokens`` tokens.  They count as stored once their step has run."""
        past, self.length = self.length, self.length + num_tokens
        assert self.length <= self.capacity, (self.length, self.capacity)
        return CachedTokens(self, past, num_tokens, absorbed)


class CachedTokens:
    """Consecutive new tokens of one cached sequence, as the model's attention context."""

    def __init__(self, cache: LatentCache, past: int, num_tokens: int, absorbed: bool) -> None:
        self._cache = cache
        self._past = past
        self._rows = slice(0, num_tokens)
        self.positions_T = torch.arange(past, past + num_tokens, device=cache.device)
        self._absorbed = absorbed

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        self._cache.store(layer, self._past, entries_TX)
        return entries_TX

    paged: PagedStep | None = None

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup]:
        seen = self._cache.read(layer, self._past + self._rows.stop)
        yield AttentionGroup(self._rows, 1, seen, self._past, self._absorbed)
