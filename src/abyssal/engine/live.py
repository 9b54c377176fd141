"""What a running sequence is besides its pages: its tokens, its text, its random numbers, what is to be returned of it.

The scheduler knows numbers of tokens and pages; this is the rest, and it outlives a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from abyssal.engine.logprobs import token_logprobs
from abyssal.engine.messages import CompletionOutput, FinishReason, Request, TokenLogprobs
from abyssal.engine.penalties import TokenHistory, has_penalty
from abyssal.engine.random import fork_seed
from abyssal.engine.sampler import Row
from abyssal.engine.stop import OutputText
from abyssal.engine.structured import Structure
from abyssal.engine.transfer import Prefilled
from abyssal.engine.verify import Drafted


@dataclass(frozen=True)
class Taken:
    """What a sequence made of sampled tokens."""

    tokens: tuple[int, ...]
    """Those kept: nothing follows the one that ends the output."""
    stopped: bool
    """A stop text or token ended it."""


class LiveSequence:
    """One completion of a request under way.

    Args:
        index: which of the request's completions.
        seed: of the request; each completion has its own from it.
        ends: the model's end tokens.
        byte_strings: of the tokenizer; None without one.
        structure: of its own.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        seed: int,
        ends: Sequence[int] = (),
        byte_strings: Sequence[bytes] | None = None,
        structure: Structure | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.num_prompt = len(request.prompt_ids)
        self.tokens = [*request.prompt_ids, *request.output_ids]
        self.drafts: tuple[int, ...] = ()
        """Drafted tokens that the next step verifies."""
        self.text = OutputText(params, byte_strings, ends)
        self.text.push(request.output_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.total_logprob = 0.0
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * len(request.prompt_ids)
        self.experts: list[np.ndarray | None] = []
        """By position, (layers, K)."""
        self.versions: list[tuple[int, int]] = []
        """Of the weights, and how many output tokens in a row were sampled with them."""
        self.cached_tokens = 0
        self.began: float | None = None
        """When its first step began, by the engine's clock; until then it was in the queue."""
        self.finish_reason: FinishReason | None = None
        self.error = ""
        self.seed = seed
        self._cached_elsewhere = 0
        self._seed = fork_seed(seed, index)
        self._ends = (*(() if params.ignore_eos else ends), *params.stop_token_ids)
        self._structure = structure
        if structure is not None and request.output_ids:
            structure.advance(request.output_ids)
        self._history = TokenHistory(request.prompt_ids, request.output_ids) if has_penalty(params) else None

    def resume(self, prefilled: Prefilled) -> None:
        """Take over what another engine has noted while it computed the prompt."""
        self._cached_elsewhere = self.cached_tokens = prefilled.cached_tokens
        self.logprobs = list(prefilled.logprobs)
        self.total_logprob = sum(each.logprob for each in self.logprobs)
        self.prompt_logprobs = list(prefilled.prompt_logprobs) or self.prompt_logprobs
        self.versions = list(prefilled.versions)
        self.experts = [None if rows is None else rows.tensor().numpy() for rows in prefilled.experts]

    def note_cached(self, num_tokens: int) -> None:
        """Prompt tokens that came from a cache, here or where the prompt was computed."""
        self.cached_tokens = max(num_tokens, self._cached_elsewhere)

    def drafted(self, num_drafts: int) -> Drafted:
        """What the rows of logits at its end are sampled by, the first ``num_drafts`` drafts to be verified.

        Raises:
            ValueError: its structure cannot be followed.
        """
        drafts = self.drafts[:num_drafts]
        masks = None if self._structure is None else self._structure.masks(drafts)
        row = Row(
            self.request.params,
            self._seed,
            position=len(self.tokens),
            num_outputs=len(self.tokens) - self.num_prompt,
            history=self._history,
            ends=self._ends,
            allowed=None if masks is None else masks[0],
        )
        return Drafted(row, drafts, allowed=masks)

    def draft_row(self, drafts: Sequence[int]) -> Row:
        """What a draft after ``drafts`` is drawn by: the parameters and random numbers of the target's own draw."""
        row = self.drafted(0).row
        return replace(
            row,
            position=row.position + len(drafts),
            num_outputs=row.num_outputs + len(drafts),
            drafted=tuple(drafts),
            allowed=None if drafts else row.allowed,
        )

    def take(self, tokens: Sequence[int], logits_TV: np.ndarray) -> Taken:
        """Append sampled tokens up to the one that ends the output.

        Args:
            logits_TV: FP32, the rows that they were sampled from.
        """
        before = self.text.num_tokens
        self.text.push(tokens)
        kept = tokens[: self.text.num_tokens - before]
        self.tokens += kept
        if self._history is not None:
            self._history.append(kept)
        if self._structure is not None:
            self._structure.advance(kept)
        self._note_logprobs(kept, logits_TV)
        return Taken(tuple(kept), self.text.stop_reason is not None)

    def _note_logprobs(self, kept: Sequence[int], logits_TV: np.ndarray) -> None:
        params = self.request.params
        if params.logprobs is None and params.best_of is None:
            return
        found = token_logprobs(logits_TV[: len(kept)], kept, [params.logprobs or 0] * len(kept))
        self.total_logprob += sum(each.logprob for each in found if each is not None)
        if params.logprobs is not None:
            self.logprobs += [each for each in found if each is not None]

    def note_prompt(self, start: int, logits_TV: np.ndarray) -> None:
        """Log-probabilities of the prompt's tokens, from the logits of positions ``start`` on."""
        most = self.request.params.prompt_logprobs
        following = self.tokens[start + 1 : min(start + 1 + len(logits_TV), self.num_prompt)]
        found = token_logprobs(logits_TV[: len(following)], following, [most or 0] * len(following))
        self.prompt_logprobs[start + 1 : start + 1 + len(following)] = found

    def note_experts(self, start: int, experts_TLK: np.ndarray) -> None:
        """Routed experts of the tokens from position ``start`` on; of those computed again, the first stand."""
        self.experts += [None] * (start - len(self.experts))
        self.experts += list(experts_TLK[len(self.experts) - start :])

    def note_version(self, version: int, count: int) -> None:
        """The last ``count`` tokens were sampled with weights of ``version``."""
        if self.versions and self.versions[-1][0] == version:
            count += self.versions.pop()[1]
        self.versions.append((version, count))

    def change_weights(self) -> None:
        """Other weights compute it from here on; what was noted of a prompt that nothing was sampled from is void."""
        self.drafts = ()
        if not self.versions:
            self.experts = []

    def finish(self, reason: FinishReason, detail: str = "") -> None:
        """It has ended; held-back text is let go."""
        self.finish_reason, self.error = reason, detail
        if self.text.stop_reason is None:
            self.text.finish()

    def output(self) -> CompletionOutput:
        """As it stands."""
        params = self.request.params
        experts = None
        if params.return_experts and self.experts and all(rows is not None for rows in self.experts):
            experts = np.stack([rows for rows in self.experts if rows is not None])
        return CompletionOutput(
            index=self.index,
            token_ids=tuple(self.tokens[self.num_prompt :]),
            text=self.text.text,
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            logprobs=tuple(self.logprobs) if params.logprobs is not None else None,
            stop_reason=self.text.stop_reason,
            experts=experts,
            versions=tuple(self.versions),
            began=self.began,
        )
