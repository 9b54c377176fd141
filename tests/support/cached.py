"""One sequence over pages, chunk after chunk: the cache as tests of the model want it."""

from __future__ import annotations

import torch

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.spec.model import ModelSpec


class CachedSequence:
    """Pages for ``num_tokens``, which lie in reverse order."""

    def __init__(self, spec: ModelSpec, num_tokens: int, dtype: torch.dtype) -> None:
        count = -(-num_tokens // PAGE)
        self._cache = PagedCache(spec, count, dtype)
        self._pages = tuple(reversed(range(count)))
        self._length = 0

    def extend(self, num_tokens: int, absorbed: bool) -> PagedBatch:
        """The context of the next ``num_tokens`` tokens.  They count as stored once their step has run."""
        start, self._length = self._length, self._length + num_tokens
        pages = self._pages[: -(-self._length // PAGE)]
        return PagedBatch(self._cache, [PagedTokens(start, num_tokens, pages, absorbed)])
