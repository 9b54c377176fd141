"""Drafts from the model's own multi-token-prediction modules [V3 section 5.4.3].

After a pass of the main model, the modules run over the same positions: depth k at position i takes the hidden state of
the depth before it and token i + k + 1, and predicts token i + k + 2 [V3 eq. 21–23].  Of the last position they give
the drafts: the first depth's prediction is the first draft, which the second depth reads, and so on; past its depth the
last module goes on with its own hidden states and drafts.

The modules' layers keep entries in the pages like the main model's.  An entry made with a draft in place of a token, or
found in a page whose text went on otherwise, is made again when its token is known; until then it is a guess among
guesses.  Nothing here can make the output wrong: the main model verifies every draft.

While no drafts are wanted, the modules follow a page at a time: the hidden states of a page are kept until it is full,
and are passed through the modules together, so that no page lacks their entries when drafting goes on.  That costs the
modules' layers once a token, one in sixty of DeepSeek-V3; a small model that never drafts is better off with none.

Legend: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import Chunk
from abyssal.engine.sampler import as_rows, sample_rows
from abyssal.engine.transfer import DraftState, TensorBytes
from abyssal.model.transformer import Transformer


@dataclass(frozen=True)
class Advance:
    """A chunk that has run, of a sequence that goes on."""

    live: LiveSequence
    chunk: Chunk
    hidden_TD: Tensor
    """Of the main model, at the chunk's positions that stand (rejected drafts do not)."""
    drafts: bool
    """Whether its newest token was sampled, so that drafts are wanted."""


@dataclass(frozen=True)
class _Tail:
    """Hidden states of the main model at the last positions before ``stop``: those that the modules have yet to see, or
    see again."""

    stop: int
    pieces: list[Tensor]

    @property
    def hidden_TD(self) -> Tensor:
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)


class Drafter:
    """The drafting side of speculation.

    Args:
        model: with one MTP module at least.
        cache: with the modules' layers.
        most: drafts a sequence and step, at most.
    """

    def __init__(self, model: Transformer, cache: PagedCache, most: int) -> None:
        assert len(model.mtp), "without MTP modules there is nothing to draft with"
        self._model = model
        self._cache = cache
        self._depth = len(model.mtp)
        self._levels = min(self._depth, most)
        self._tails: dict[int, _Tail] = {}

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        self._tails.pop(sequence, None)

    def state(self, sequence: int, drafts: tuple[int, ...]) -> DraftState:
        """Where a sequence's drafting stands."""
        tail = self._tails.get(sequence)
        if tail is None:
            return DraftState(drafts, 0, None)
        return DraftState(drafts, tail.stop, TensorBytes.of(tail.hidden_TD))

    def resume(self, sequence: int, state: DraftState) -> None:
        """Go on where another engine's drafting stood; the drafts are the live sequence's."""
        if state.hidden_TD is not None:
            self._tails[sequence] = _Tail(state.stop, [state.hidden_TD.tensor().to(self._cache.device)])

    @torch.inference_mode()
    def advance(self, steps: Sequence[Advance], num_drafts: int) -> None:
        """Run the modules over what was computed, and leave ``num_drafts`` drafts in the live sequences that want them.

        Without drafts to make, sequences that write wait until a page is full."""
        if not num_drafts:
            steps = [step for step in steps if not self._waits(step)]
        steps = [self._with_tail(step) for step in steps if len(step.hidden_TD)]
        if not steps:
            return
        hidden = [step.hidden_TD for step in steps]
        drafts: list[list[int]] = [[] for _ in steps]
        for depth in range(self._levels):
            hidden = self._level(depth, steps, hidden, drafts)
            self._draft(steps, [rows[-1:] for rows in hidden], drafts)
        self._go_on(steps, [rows[-1:] for rows in hidden], drafts, num_drafts)
        for step, drafted in zip(steps, drafts, strict=True):
            step.live.drafts = tuple(drafted[:num_drafts])

    def _waits(self, step: Advance) -> bool:
        """Whether a sequence's new hidden states are kept for later instead of being run."""
        chunk, tail = step.chunk, self._tails.get(step.chunk.sequence)
        stop = chunk.start + len(step.hidden_TD)
        if chunk.path != "decode" or tail is None or tail.stop != chunk.start or stop % PAGE < len(step.hidden_TD):
            return False
        self._tails[chunk.sequence] = _Tail(stop, [*tail.pieces, step.hidden_TD])
        return True

    def _with_tail(self, step: Advance) -> Advance:
        """Begin where the modules have not been, and earlier by the depths after the first, whose last entries were
        made with drafts, where the hidden states were kept."""
        chunk, hidden_TD = step.chunk, step.hidden_TD
        tail = self._tails.get(chunk.sequence)
        stop = chunk.start + len(hidden_TD)
        if tail is not None and tail.stop == chunk.start:
            hidden_TD = torch.cat([tail.hidden_TD, hidden_TD])
        self._tails[chunk.sequence] = _Tail(stop, [hidden_TD[max(0, len(hidden_TD) - self._levels + 1) :].clone()])
        return replace(step, hidden_TD=hidden_TD, chunk=replace_span(chunk, stop - len(hidden_TD), stop))

    def _level(
        self, depth: int, steps: Sequence[Advance], hidden: Sequence[Tensor], drafts: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """One module over all positions of all chunks."""
        tokens = [
            _token(step.live, position + depth + 1, drafted)
            for step, drafted in zip(steps, drafts, strict=True)
            for position in range(step.chunk.start, step.chunk.stop)
        ]
        parts = [
            PagedTokens(step.chunk.start, step.chunk.num_tokens, step.chunk.pages, step.chunk.path == "decode")
            for step in steps
        ]
        found_TD = self._pass(depth, tokens, torch.cat(list(hidden)), parts)
        return list(found_TD.split([step.chunk.num_tokens for step in steps]))

    def _go_on(self, steps: Sequence[Advance], hidden: list[Tensor], drafts: list[list[int]], num_drafts: int) -> None:
        """Past its depth, the last module on its own drafts, as far as the sequences' pages reach."""
        for extra in range(num_drafts - self._depth):
            able = [
                index
                for index, step in enumerate(steps)
                if step.drafts and step.chunk.stop + extra < len(step.chunk.pages) * PAGE
                if len(drafts[index]) == self._depth + extra
            ]
            if not able:
                return
            parts = [PagedTokens(steps[i].chunk.stop + extra, 1, steps[i].chunk.pages, True) for i in able]
            tokens = [drafts[i][-1] for i in able]
            found_TD = self._pass(self._depth - 1, tokens, torch.cat([hidden[i] for i in able]), parts)
            for row, index in enumerate(able):
                hidden[index] = found_TD[row : row + 1]
            self._draft([steps[i] for i in able], [hidden[i] for i in able], [drafts[i] for i in able])

    def _pass(self, depth: int, tokens: list[int], hidden_TD: Tensor, parts: Sequence[PagedTokens]) -> Tensor:
        step = self._model.step(PagedBatch(self._cache, parts), self._model.local_dispatcher())
        tokens_T = torch.tensor(tokens, dtype=torch.long, device=self._cache.device)
        return self._model.mtp_hidden(depth, tokens_T, hidden_TD, step)

    def _draft(self, steps: Sequence[Advance], last: Sequence[Tensor], drafts: Sequence[list[int]]) -> None:
        """Draw the next draft of each sequence that wants one, with the random numbers of the target's own draw."""
        wanting = [index for index, step in enumerate(steps) if step.drafts]
        if not wanting:
            return
        logits_TV = as_rows(self._model.logits(torch.cat([last[index] for index in wanting])))
        rows = [steps[index].live.draft_row(drafts[index]) for index in wanting]
        draws = sample_rows(logits_TV, rows)
        for row, index in enumerate(wanting):
            if row not in draws.errors:
                drafts[index].append(int(draws.tokens_T[row]))


def _token(live: LiveSequence, position: int, drafted: Sequence[int]) -> int:
    """The token at ``position``: known, drafted, or for want of either the last one known."""
    known = len(live.tokens)
    if position < known:
        return live.tokens[position]
    return drafted[position - known] if position - known < len(drafted) else live.tokens[-1]


def replace_span(chunk: Chunk, start: int, stop: int) -> Chunk:
    """The chunk over other positions; its tokens are not looked at any more."""
    count = stop - start
    return replace(chunk, start=start, num_tokens=count, tokens=(0,) * count, num_drafts=0)
