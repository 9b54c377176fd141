"""The scheduler's limits and choices, and which requests can run within them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from abyssal.cache.pages import PAGE
from abyssal.engine.messages import Request


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and choices of the scheduler."""

    max_positions: int
    """Of the model: prompt and output together."""
    token_budget: int = 512
    """Tokens a step, drafts included."""
    max_sequences: int = 64
    """Sequences that hold pages at once."""
    end_token_ids: tuple[int, ...] = ()
    """The model's own end tokens."""
    vocab_size: int | None = None
    """To refuse tokens out of range; None: unchecked."""
    num_drafts: int = 0
    """Drafts verified a step and sequence, at most; 0: no speculation."""
    draft_layers: int = 0
    """MTP layers that keep entries in the pages: so many last tokens of a cached prefix are computed again."""
    deterministic: bool = False
    """Every token by the path of an undisturbed run: replays go path by path, and only prompt-path pages are shared."""
    preemption: Literal["recompute", "offload"] = "recompute"
    """What becomes of the pages of a preempted sequence."""
    save_every: int = 4096
    """Tokens after which a long sequence's full pages are offered to the caches before it ends; a multiple of 64."""
    output_cost: int = 2
    """What an output token counts for fairness; a prompt token counts 1 [Sheng et al. 2024]."""

    def __post_init__(self) -> None:
        for name in ("max_positions", "token_budget", "max_sequences", "output_cost"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.num_drafts < 0:
            raise ValueError(f"num_drafts: {self.num_drafts} must be at least 0 (no speculation)")
        if self.token_budget < self.max_sequences:
            raise ValueError(
                f"token_budget: {self.token_budget} tokens a step do not give one to each of max_sequences "
                f"{self.max_sequences}; raise it or lower max_sequences"
            )
        if self.save_every < PAGE or self.save_every % PAGE:
            raise ValueError(f"save_every: {self.save_every} must be a multiple of {PAGE}")
        if self.preemption not in ("recompute", "offload"):
            raise ValueError(f"preemption: {self.preemption!r} must be recompute or offload")


def token_limit(request: Request, config: SchedulerConfig, num_pages: int) -> int:
    """Tokens, prompt and output, at which a request ends: what it asks for, as far as model and cache go."""
    longest = min(config.max_positions, num_pages * PAGE)
    most = request.params.max_tokens
    return longest if most is None else min(longest, len(request.prompt_ids) + most)


def check_request(request: Request, config: SchedulerConfig, num_pages: int, live: Collection[int]) -> None:
    """Raise ``ValueError`` for a request that can never run, naming the field, its value and what would do.

    ``live`` holds the numbers of the requests that have not ended.
    """
    _check_fields(request)
    _check_tokens(request, config, num_pages)
    params, known = request.params, len(request.prompt_ids) + len(request.output_ids)
    if request.request_id in live:
        raise ValueError(f"request_id: {request.request_id} is that of a request still under way; give each its own")
    if params.num_samples > config.max_sequences:
        name = "n" if params.best_of is None else "best_of"
        raise ValueError(
            f"{name}: {params.num_samples} completions are more than the max_sequences {config.max_sequences} that run "
            "at once; ask for fewer"
        )
    if params.num_samples > 1 and (request.prefill_only or request.output_ids or request.imported_tokens):
        raise ValueError(f"n: {params.num_samples} completions cannot be split between prefill and decode units; use 1")
    if request.output_ids and known >= token_limit(request, config, num_pages):
        raise ValueError(f"output_ids: {len(request.output_ids)} tokens leave none to be made; raise max_tokens")
    if request.imported_tokens not in (0, known - 1):
        raise ValueError(
            f"imported_tokens: {request.imported_tokens} must be 0 or {known - 1}, all known tokens but the last"
        )


def _check_fields(request: Request) -> None:
    """What would otherwise be found in the middle of a step, which others share."""
    known = (*request.prompt_ids, *request.output_ids)
    if not all(hasattr(kind, "__index__") for kind in set(map(type, known))):
        wrong = next(token for token in known if not hasattr(token, "__index__"))
        raise ValueError(f"prompt: {wrong!r} is no token; its tokens must be whole numbers")
    for name, value in (("user", request.user), ("namespace", request.namespace)):
        if not isinstance(value, str) or value.encode(errors="replace").decode() != value:
            raise ValueError(f"{name}: {value!r} must be text, without halves of surrogate pairs")
    if not isinstance(request.priority, int):
        raise ValueError(f"priority: {request.priority!r} must be a whole number; higher ones run first")
    if request.deadline is not None and math.isnan(request.deadline):
        raise ValueError(f"deadline: {request.deadline} is no time; give seconds on the engine's clock, or None")


def _check_tokens(request: Request, config: SchedulerConfig, num_pages: int) -> None:
    count = len(request.prompt_ids)
    if not count:
        raise ValueError("prompt: holds no token; give some text, or the tokenizer's begin-of-sequence token")
    if count >= config.max_positions:
        raise ValueError(
            f"prompt: its {count} tokens leave no room for output within the model's max_positions "
            f"{config.max_positions}; shorten it"
        )
    if count >= num_pages * PAGE:
        raise ValueError(
            f"prompt: its {count} tokens leave no room for output in the cache, whose {num_pages} pages hold "
            f"{num_pages * PAGE} tokens; shorten it or give the cache more memory"
        )
    if config.vocab_size is not None:
        tokens = (*request.prompt_ids, *request.output_ids)
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"prompt: token {wrong} is outside the vocabulary of {config.vocab_size} tokens "
                f"(0..{config.vocab_size - 1}); was it made by another tokenizer?"
            )
