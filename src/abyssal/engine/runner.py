"""Step plans carried out by a model on this machine: one pass over all chunks, then a token for each that samples.

``launch`` begins a step and ``collect`` gives what it sampled, so that another device may compute while the next step
is being planned; here the pass is over when ``launch`` returns.  Chunks of both paths go through the model as one flat
batch: products see all rows, attention sees each chunk over its own pages.

Legend: T tokens of a step, V vocabulary, L layers with experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.engine.gain import DraftStatistics
from abyssal.engine.live import LiveSequence
from abyssal.engine.loads import ExpertLoads
from abyssal.engine.messages import Chunk, Sampled, StepPlan
from abyssal.engine.moving import PageMover
from abyssal.engine.sampler import as_rows
from abyssal.engine.speculate import Advance, Drafter
from abyssal.engine.transfer import DraftState
from abyssal.engine.verify import Drafted, verify
from abyssal.model.dispatch import LocalDispatcher
from abyssal.model.router import Routing
from abyssal.model.transformer import ACTIVATION_DTYPES, Transformer
from abyssal.spec.placement import Placement


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    plan: StepPlan
    logits_TV: np.ndarray
    """FP32 rows that something is sampled or scored from, chunk after chunk."""
    rows: tuple[slice, ...]
    """Of each chunk among them."""
    hidden_TD: Tensor | None = None
    """Of all tokens, where drafts are wanted."""
    experts_TLK: np.ndarray | None = None
    """Of all tokens, where a request wants its routing."""


def cache_dtype(model: Transformer) -> torch.dtype:
    """Of the entries: that of the model's activations."""
    return ACTIVATION_DTYPES.get(model.recipe.activations, model.embed.weight.dtype)


class ModelRunner:
    """Runs plans on a model and its paged cache.

    Args:
        model: held by reference; whoever changes its weights voids the cache.
        cache: pages that the plans name.
        live: the running sequences by number, as the engine keeps them.
        mover: carries out exports and imports.
        num_drafts: tokens that the MTP modules draft for each sequence and step, at most; 0: the modules never run.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        live: Mapping[int, LiveSequence],
        mover: PageMover,
        num_drafts: int = 0,
    ) -> None:
        self._model = model
        self._cache = cache
        self._live = live
        self._mover = mover
        self._drafter = Drafter(model, cache, num_drafts) if num_drafts else None
        self._mixtures = [block for block in model.blocks() if block.placement is not None]
        self._placements: list[Placement | None] = []
        self._dispatcher = model.local_dispatcher()
        self.loads = ExpertLoads(model)
        self.weights_version = 0
        """Of the model's weights, as the engine's owner counts them."""
        self._drafted, self._accepted = [0] * num_drafts, [0] * num_drafts  # by position

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Exports and copies, then the pass, while imports are on their way."""
        self._mover.send(plan.exports)
        self._cache.copy_pages(plan.copies)
        self._mover.fetch(plan.imports)
        if not plan.chunks:
            return Launched(plan, np.empty((0, 0), np.float32), ())
        tokens = [token for chunk in plan.chunks for token in self._tokens(chunk)]
        tokens_T = torch.tensor(tokens, dtype=torch.long, device=self._cache.device)
        parts = [PagedTokens(c.start, c.num_tokens, c.pages, c.path == "decode") for c in plan.chunks]
        step = self._model.step(PagedBatch(self._cache, parts), self._local_dispatcher())
        hidden_TD = self._model.hidden(tokens_T, step)
        self.loads.note(step.routings)
        experts_TLK = self._experts(plan, step.routings)
        wanted, rows = _wanted_rows(plan)
        wanted_RD = hidden_TD
        if len(wanted) < len(tokens):
            wanted_RD = hidden_TD[torch.tensor(wanted, dtype=torch.long, device=hidden_TD.device)]
        logits_TV = as_rows(self._model.logits(wanted_RD))
        return Launched(plan, logits_TV, rows, None if self._drafter is None else hidden_TD, experts_TLK)

    def _local_dispatcher(self) -> LocalDispatcher:
        """Of the present placements; one is kept as long as they stay."""
        placements = [block.placement for block in self._mixtures]
        if placements != self._placements:
            self._dispatcher, self._placements = self._model.local_dispatcher(), placements
        return self._dispatcher

    def collect(self, launched: Launched) -> dict[int, Sampled]:
        """What the step sampled, by sequence; its live sequences have taken it in."""
        sampling: list[tuple[int, slice]] = []
        for chunk, rows in zip(launched.plan.chunks, launched.rows, strict=True):
            if chunk.scores:
                self._live[chunk.sequence].note_prompt(chunk.start, launched.logits_TV[rows])
            if chunk.samples:
                last = slice(rows.stop - chunk.num_drafts - 1, rows.stop)
                sampling += [(number, last) for number in (chunk.sequence, *chunk.forks)]
        results = self._sample(launched.logits_TV, sampling)
        if launched.experts_TLK is not None:
            self._note_experts(launched.plan, launched.experts_TLK, results)
        return self._draft(launched, results) if self._drafter is not None and launched.plan.chunks else results

    def _draft(self, launched: Launched, results: dict[int, Sampled]) -> dict[int, Sampled]:
        """Let the MTP modules follow, and say how many drafts each sequence has now."""
        assert self._drafter is not None and launched.hidden_TD is not None
        steps: list[Advance] = []
        wanted = launched.plan.wanted_drafts
        begin = 0
        for chunk in launched.plan.chunks:
            rows_TD = launched.hidden_TD[begin : begin + chunk.num_tokens]
            begin += chunk.num_tokens
            sampled, live = results.get(chunk.sequence), self._live[chunk.sequence]
            if sampled is None:
                steps.append(Advance(live, chunk, rows_TD, False))
            elif not sampled.error:
                steps.append(
                    Advance(
                        live,
                        chunk,
                        rows_TD[: _standing(chunk, sampled)],
                        wanted > 0 and not (sampled.stopped or chunk.forks),
                    )
                )
        self._drafter.advance(steps, wanted)
        return {number: replace(each, num_drafts=len(self._live[number].drafts)) for number, each in results.items()}

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        self._mover.forget(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def forget_all(self) -> None:
        """All pages are void."""
        for sequence in self._live:
            self.forget(sequence)

    def free(self) -> None:
        """Give the memory of the pages back, until :meth:`allocate`."""
        self._cache.free()

    def allocate(self) -> None:
        """Take it again."""
        self._cache.allocate()

    def draft_state(self, sequence: int) -> DraftState | None:
        """Where drafting stands, for another engine to go on with; None without drafting."""
        return None if self._drafter is None else self._drafter.state(sequence, self._live[sequence].drafts)

    def resume_drafting(self, sequence: int, state: DraftState | None) -> None:
        """Go on drafting where another engine stood."""
        if self._drafter is not None and state is not None:
            self._live[sequence].drafts = state.drafts
            self._drafter.resume(sequence, state)

    def _sample(self, logits_TV: np.ndarray, sampling: list[tuple[int, slice]]) -> dict[int, Sampled]:
        results: dict[int, Sampled] = {}
        drafted: list[Drafted] = []
        able: list[tuple[int, slice]] = []
        for number, rows in sampling:
            try:
                drafted.append(self._live[number].drafted(rows.stop - rows.start - 1))
                able.append((number, rows))
            except ValueError as error:
                results[number] = Sampled((), error=str(error))
        if not able:
            return results
        wanted = [row for _, rows in able for row in range(rows.start, rows.stop)]
        together_TV = logits_TV if wanted == list(range(len(logits_TV))) else logits_TV[wanted]
        for (number, rows), verified in zip(able, verify(together_TV, drafted), strict=True):
            self._count_drafts(rows.stop - rows.start - 1, verified.num_accepted)
            results[number] = self._take(number, logits_TV[rows], verified.tokens, verified.error)
        return results

    def _count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        for position in range(num_drafts):
            self._drafted[position] += 1
            self._accepted[position] += position < num_accepted

    @property
    def draft_statistics(self) -> DraftStatistics:
        """Since the beginning."""
        return DraftStatistics(tuple(self._drafted), tuple(self._accepted))

    def _take(self, number: int, logits_TV: np.ndarray, tokens: tuple[int, ...], error: str | None) -> Sampled:
        if error is not None:
            return Sampled((), error=error)
        live = self._live[number]
        try:
            taken = live.take(tokens, logits_TV)
        except ValueError as failure:
            return Sampled((), error=str(failure))
        live.drafts = ()
        live.note_version(self.weights_version, len(taken.tokens))
        return Sampled(taken.tokens, 0, taken.stopped)

    def _tokens(self, chunk: Chunk) -> list[int]:
        return [*chunk.tokens, *self._live[chunk.sequence].drafts[: chunk.num_drafts]]

    def _experts(self, plan: StepPlan, routings: Mapping[int, Routing]) -> np.ndarray | None:
        asked = any(self._live[chunk.sequence].request.params.return_experts for chunk in plan.chunks)
        if not asked or not routings:
            return None
        return torch.stack([routings[layer].expert_ids_TK for layer in sorted(routings)], 1).cpu().numpy()

    def _note_experts(self, plan: StepPlan, experts_TLK: np.ndarray, results: Mapping[int, Sampled]) -> None:
        """Of the tokens that stand: what replaces a rejected draft is routed by itself."""
        begin = 0
        for chunk in plan.chunks:
            live = self._live[chunk.sequence]
            if live.request.params.return_experts:
                valid = _standing(chunk, results.get(chunk.sequence))
                live.note_experts(chunk.start, experts_TLK[begin : begin + valid])
                for fork in chunk.forks:
                    self._live[fork].experts = list(live.experts)
            begin += chunk.num_tokens


def _standing(chunk: Chunk, sampled: Sampled | None) -> int:
    """How many of a chunk's tokens belong to its sequence: all but rejected drafts."""
    accepted = max(0, len(sampled.tokens) - 1) if sampled is not None else 0
    return chunk.num_tokens - chunk.num_drafts + accepted


def _wanted_rows(plan: StepPlan) -> tuple[list[int], tuple[slice, ...]]:
    """Tokens of the step whose logits are wanted, and where each chunk's are among them."""
    wanted: list[int] = []
    slices: list[slice] = []
    begin = 0
    for chunk in plan.chunks:
        end = begin + chunk.num_tokens
        first = begin if chunk.scores else end - chunk.num_drafts - 1 if chunk.samples else end
        slices.append(slice(len(wanted), len(wanted) + end - first))
        wanted += range(first, end)
        begin = end
    return wanted, tuple(slices)
