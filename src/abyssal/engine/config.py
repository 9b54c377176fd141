"""An engine's memory and choices, and what they come to for a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abyssal.cache.paged import PagedCache, PageDtype
from abyssal.cache.pages import PAGE
from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.runner import cache_dtype
from abyssal.model.transformer import Transformer

DEFAULT_CACHE_BYTES = 1 << 28


@dataclass(frozen=True)
class EngineConfig:
    """Memory and choices of an engine."""

    cache_tokens: int | None = None
    """Tokens that the paged cache holds, rounded up to pages of 64; by default 16 times the model's length, as far as
    256 MiB go, and once its length in any case."""
    token_budget: int = 512
    """Tokens a step."""
    max_sequences: int = 64
    """Sequences that run at once."""
    prefix_cache: bool = True
    """Keep pages of ended requests for requests that begin alike."""
    deterministic: bool = False
    """Every token by the path of an undisturbed run; only pages of prompts are shared."""
    num_drafts: int | Literal["auto"] = 0
    """Tokens that the model's MTP modules draft for each sequence and step, to be verified in one pass; 0: none.
    ``auto``: as many as there are modules, as long as they make tokens come faster, which is measured."""
    preemption: Literal["recompute", "offload"] = "recompute"
    """What becomes of the pages of a preempted sequence: computed again, or written to the disk cache and read back."""
    disk_cache: bool = True
    """Keep pages on disk, for this engine later and for others of the same model: of an engine over a model folder."""
    disk_cache_folder: str | None = None
    """Where; by default ``~/.cache/abyssal/pages`` (``$XDG_CACHE_HOME``), which ``abyssal cache`` looks into."""
    disk_cache_bytes: int | None = None
    """How large it may become; by default a tenth of what is free on the disk, at most 64 GiB."""
    page_dtype: PageDtype = "model"
    """What pages hold: values in the activations' dtype, or FP8 codes with their scales, about half of BF16's bytes."""

    def __post_init__(self) -> None:
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ValueError(
                f"cache_tokens: {self.cache_tokens}, but the cache needs memory for one page of {PAGE} tokens"
            )
        if self.num_drafts != "auto" and not isinstance(self.num_drafts, int):
            raise ValueError(f"num_drafts: {self.num_drafts!r} must be a number of tokens, 0 for none, or 'auto'")

    def drafts(self, model: Transformer) -> int:
        """Tokens drafted a sequence and step, at most.

        Raises:
            ValueError: some are wanted of a model that has nothing to draft with.
        """
        if self.num_drafts == "auto":
            return len(model.mtp)
        if self.num_drafts and not len(model.mtp):
            raise ValueError(
                f"num_drafts: {self.num_drafts} tokens cannot be drafted by a model without MTP modules; set it to 0"
            )
        return self.num_drafts

    def num_pages(self, model: Transformer) -> int:
        """Pages of the cache."""
        if self.cache_tokens is not None:
            return -(-self.cache_tokens // PAGE)
        longest = -(-model.spec.max_positions // PAGE)
        one = PagedCache(model.spec, 1, cache_dtype(model), page_dtype=self.page_dtype)
        return max(longest, min(16 * longest, DEFAULT_CACHE_BYTES // one.page_bytes))

    def of_scheduler(self, model: Transformer, end_token_ids: tuple[int, ...]) -> SchedulerConfig:
        """The scheduler's part of it."""
        num_drafts = self.drafts(model)
        return SchedulerConfig(
            max_positions=model.spec.max_positions,
            token_budget=self.token_budget,
            max_sequences=self.max_sequences,
            end_token_ids=end_token_ids,
            vocab_size=model.spec.vocab_size,
            num_drafts=num_drafts,
            draft_layers=min(len(model.mtp), num_drafts),
            deterministic=self.deterministic,
            preemption=self.preemption,
        )
