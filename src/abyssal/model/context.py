"""How attention sees earlier tokens: the protocol the model needs, and the packed batch that training uses.

The model works on flat tokens.  Which of them belong together, and where their earlier keys come from, is the
context's business: a packed batch sees only itself, a cache also sees what it has stored.  Attention asks the context
for groups of equal-shaped sequences, and computes each group as one dense problem; sequences that decode over pages
make one group, of any shapes, whose entries are read where they lie.

Legend: T tokens (flat), X cached values of a token in one layer, B sequences of a group, P pages of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from abyssal.kernels.latent_attention import PageTable


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of one shape: ``num_sequences`` times the same number of queries, of keys, and of past keys."""

    rows: slice
    """Its queries in the flat batch, sequence after sequence."""
    num_sequences: int
    entries: Tensor
    """(num_sequences * keys, X): what every token that may be seen has stored, sequence after sequence."""
    past: int
    """Keys before the first query of a sequence; query i sees keys 0 .. past + i."""
    absorbed: bool = False
    """Whether latent attention is computed in its absorbed form (decoding) or expanded (training, prefill)."""


@dataclass(frozen=True)
class PagedGroup:
    """Sequences of any shapes over the pages of a cache, for latent attention in its absorbed form."""

    rows: slice
    """Their queries in the flat batch, sequence after sequence."""
    entries_PSX: Tensor
    """Every page of the layer."""
    table: PageTable
    """Whose pages are which."""
    absorbed: ClassVar[bool] = True


@dataclass(frozen=True)
class PagedStep:
    """A step whose tokens all decode over the pages of a cache: one :class:`PagedGroup` in every layer."""

    entries_PLSX: Tensor
    slots_T: Tensor
    """int64: row of a layer that each token writes, counted in entries from the layer's first page."""
    table: PageTable


class AttentionContext(Protocol):
    """What a step hands to attention."""

    positions_T: Tensor
    """Position of each token in its sequence, int64."""
    paged: PagedStep | None
    """The step as a native layer takes it, where all its tokens decode over pages."""

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        """Store this step's entries of ``layer``; return what :meth:`groups` is to be given (itself, without cache)."""
        ...

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup | PagedGroup]:
        """The groups that cover all tokens of the step, in order; paged ones for latent attention alone."""
        ...


class PackedBatch:
    """Sequences laid end to end; each sees itself alone.

    Args:
        lengths: tokens of each sequence, in order.  Documents packed into one training sequence see one another
            unless each is listed as a sequence of its own.
        positions_T: positions; by default each sequence counts from 0.
        absorbed: compute latent attention in its absorbed form (to check it against the expanded one).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        positions_T: Tensor | None = None,
        absorbed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: {list(lengths)[:8]} must name at least one sequence, each of one token or more")
        if positions_T is None:
            positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        if positions_T.shape != (sum(lengths),):
            raise ValueError(
                f"positions_T: shape {tuple(positions_T.shape)} does not fit sequences of {sum(lengths)} tokens in all"
            )
        self.lengths = tuple(lengths)
        self.paged: PagedStep | None = None
        self.positions_T = positions_T
        self.absorbed = absorbed

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        return entries_TX

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup]:
        start = 0
        for length, run in groupby(self.lengths):
            count = sum(1 for _ in run)
            rows = slice(start, start + count * length)
            yield AttentionGroup(rows, count, entries_TX[rows], 0, self.absorbed)
            start = rows.stop


class ReplayBatch:
    """Prompts and outputs as a server computed them: a trainer's context that repeats the path of every token.

    A server computes prompts expanded and output tokens absorbed, one by one, each over the entries before it; the two
    forms differ in the last bits.  Here the outputs of a prompt do the same all at once: expanded prompts, absorbed
    outputs, in exact repetition without gradients on CPU (row-invariant operators).

    The flat batch is all prompts in order, then all outputs in order.

    Args:
        prompt_lengths: tokens of each prompt.
        output_lengths: computed tokens of each output: all but the last, which was sampled and not computed; may be 0.
        prompts: the prompt of each output, so that several outputs share one; by default output i follows prompt i.

    Raises:
        ValueError: lengths or prompts that do not fit.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        output_lengths: Sequence[int],
        prompts: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        prompts = range(len(prompt_lengths)) if prompts is None else prompts
        if len(prompts) != len(output_lengths) or not set(prompts) <= set(range(len(prompt_lengths))):
            raise ValueError(
                f"prompts: {list(prompts)[:8]} must name one of the {len(prompt_lengths)} prompts for each of the "
                f"{len(output_lengths)} outputs"
            )
        if min(output_lengths, default=0) < 0:
            raise ValueError(f"output_lengths: {list(output_lengths)[:8]} must be 0 or more")
        self.paged: PagedStep | None = None
        self._prompts = PackedBatch(prompt_lengths, device=device)
        starts = list(accumulate(prompt_lengths, initial=0))
        begins = accumulate(output_lengths, initial=starts[-1])
        positions = [self._prompts.positions_T]
        self._outputs: list[tuple[slice, slice]] = []
        """Rows of each output's prompt, and its own."""
        for prompt, length, begin in zip(prompts, output_lengths, begins, strict=False):
            past = prompt_lengths[prompt]
            self._outputs.append((slice(starts[prompt], starts[prompt] + past), slice(begin, begin + length)))
            positions.append(torch.arange(past, past + length, device=device))
        self.positions_T = torch.cat(positions)

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        return entries_TX

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup]:
        yield from self._prompts.groups(layer, entries_TX)
        for prompt, rows in self._outputs:
            if rows.stop > rows.start:
                seen = torch.cat([entries_TX[prompt], entries_TX[rows]])
                yield AttentionGroup(rows, 1, seen, prompt.stop - prompt.start, absorbed=True)
