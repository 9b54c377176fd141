"""The tensors of the paged cache: what each layer stores of each token, in pages of 64 tokens.

For latent attention that is the normalised latent and the rotated key, ``kv_lora_rank + qk_rope_head_dim`` values a
token a layer, and nothing else [V3 section 2.1.1]; for the dense family, keys and values.  The MTP modules' layers are
there like the others.  Which page belongs to whom is the bookkeeping's business (``cache/pages.py``).  A page's
number is the same in every layer and all its layers lie together, so that a page is copied, written to disk and read
back as one piece; a layer of many pages is then read in runs of 64 tokens, which is long enough.

In FP8 pages an entry is bytes instead, codes and their scales (:mod:`abyssal.spec.fp8_entry`), quantised as it is
written and read as the activations' dtype.  A step reads its own tokens so too: what a token sees does not depend on
whether it came in this step or in an earlier one.

Legend: T tokens of a step, P pages, X cached values of a token in one layer (bytes, in FP8 pages).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from abyssal.cache.pages import PAGE
from abyssal.kernels.fp8_entries import read_entries, write_entries
from abyssal.kernels.latent_attention import PageTable
from abyssal.model.context import AttentionGroup, PagedGroup, PagedStep
from abyssal.spec.model import LatentAttentionSpec, ModelSpec

PageDtype = Literal["model", "fp8"]
"""What pages hold: values in the activations' dtype, or E4M3 codes with their scales."""


class PagedCache:
    """Entries of many sequences in every layer.

    Args:
        spec: the model; its MTP modules have layers of their own after the last.
        num_pages: pages of :data:`~abyssal.cache.pages.PAGE` tokens.
        dtype, device: of the entries as attention reads them; those of the model's activations.
        page_dtype: of the entries as they are stored.

    Raises:
        ValueError: there is no such ``page_dtype``, or not so much memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_dtype: PageDtype = "model",
    ) -> None:
        if page_dtype not in get_args(PageDtype):
            raise ValueError(f"page_dtype: {page_dtype!r} must be one of {', '.join(get_args(PageDtype))}")
        layers = spec.num_layers + spec.mtp_depth
        self.fp8 = spec.attention.fp8_entry if page_dtype == "fp8" else None
        """How an entry lies in its bytes; None where it is values."""
        width = spec.attention.cache_values if self.fp8 is None else self.fp8.num_bytes
        stored = dtype if self.fp8 is None else torch.uint8
        self._shape = num_pages, layers, PAGE, width
        self.num_pages = num_pages
        self.entries_PLSX = torch.empty((0, *self._shape[1:]), dtype=stored, device=device)
        self.allocate()
        self.dtype = dtype
        self.in_place = isinstance(spec.attention, LatentAttentionSpec) and self.fp8 is None
        """Whether the decode path reads the pages where they lie."""
        self.device = torch.device(device)

    def free(self) -> None:
        """Give the memory back; every entry is lost, and nothing may be read or written until :meth:`allocate`."""
        self.entries_PLSX = self.entries_PLSX.new_empty((0, *self._shape[1:]))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # torch would keep it for itself

    def allocate(self) -> None:
        """Take the memory again, zeroed.

        Raises:
            ValueError: there is not so much.
        """
        try:
            self.entries_PLSX = _zeros(self._shape, self.entries_PLSX.dtype, self.entries_PLSX.device)
        except (RuntimeError, OSError, OverflowError) as error:
            raise ValueError(
                f"{self.num_pages} pages of {self.page_bytes:,} bytes do not fit into memory; lower cache_tokens, or "
                "take FP8 pages"
            ) from error

    @property
    def layout(self) -> str:
        """How a page's bytes are arranged: pages of one engine are another's only where this is the same."""
        _, layers, tokens, width = self.entries_PLSX.shape
        return f"{layers}x{tokens}x{width} " + (str(self.dtype) if self.fp8 is None else f"fp8 {self.fp8}")

    @property
    def page_bytes(self) -> int:
        """Of one page over all layers."""
        return math.prod(self._shape[1:]) * self.entries_PLSX.itemsize if self.num_pages else 0

    def layer(self, layer: int) -> Tensor:
        """A view of rows (X), in which position s of page p of this layer is row p · layers · 64 + s."""
        return self.entries_PLSX.view(-1, self.entries_PLSX.shape[-1])[layer * PAGE :]

    def store(self, layer: int, slots_T: Tensor, entries_TX: Tensor) -> None:
        """Write entries, values of ``dtype``, to rows of :meth:`layer`, each row once."""
        if self.fp8 is None:
            self.layer(layer).index_copy_(0, slots_T, entries_TX)
        else:
            write_entries(self.layer(layer), slots_T, entries_TX, self.fp8)

    def load(self, layer: int, slots_T: Tensor) -> Tensor:
        """Rows of :meth:`layer` as values of ``dtype``."""
        if self.fp8 is None:
            return self.layer(layer).index_select(0, slots_T)
        return read_entries(self.layer(layer), slots_T, self.fp8, self.dtype)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (from, to) each, in every layer."""
        for source, target in pairs:
            self.entries_PLSX[target] = self.entries_PLSX[source]

    def page_buffer(self, page: int) -> np.ndarray:
        """A page's bytes: on the CPU the page's own memory, elsewhere a copy on the host (:meth:`put_buffer`)."""
        return self.entries_PLSX[page].view(torch.uint8).cpu().numpy().reshape(-1)

    def put_buffer(self, page: int, buffer: np.ndarray) -> None:
        """Take over what was written to a page's buffer; on the CPU it is there already."""
        if self.device.type != "cpu":
            entries = self.entries_PLSX[page]
            entries.copy_(torch.from_numpy(buffer).view(entries.dtype).view(entries.shape))

    def export_layer(self, pages: Sequence[int], layer: int) -> Tensor:
        """Entries of pages in one layer, (pages, 64, X): a copy."""
        return self.entries_PLSX[list(pages), layer]

    def import_layer(self, pages: Sequence[int], layer: int, entries_PSX: Tensor) -> None:
        """The reverse of :meth:`export_layer`.

        Raises:
            ValueError: entries of another shape or dtype.
        """
        wanted = (len(pages), *self.entries_PLSX.shape[2:])
        if tuple(entries_PSX.shape) != wanted or entries_PSX.dtype != self.entries_PLSX.dtype:
            raise ValueError(
                f"entries_PSX: {tuple(entries_PSX.shape)} of {entries_PSX.dtype} do not fit pages of {wanted} of "
                f"{self.entries_PLSX.dtype}"
            )
        self.entries_PLSX[list(pages), layer] = entries_PSX.to(self.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU mapped from the system rather than taken from the allocator.

    Pages that nobody has written to then cost no memory, and what is given back reaches the system whatever the
    allocator was told to keep, which a trainer in the same process does (``cli/allocator.py``).
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork's writes are its own
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True)
class PagedTokens:
    """Consecutive new tokens of one sequence in a step."""

    start: int
    """Position of the first."""
    num_tokens: int
    pages: tuple[int, ...]
    """That hold positions 0 .. start + num_tokens."""
    absorbed: bool
    """Attention by the decode path; expanded otherwise."""


@dataclass(frozen=True)
class _Copied:
    """A part whose entries are copied together for attention."""

    part: PagedTokens
    slots: Tensor
    """Rows of :meth:`PagedCache.layer` that hold what it sees."""


class PagedBatch:
    """New tokens of several sequences, each over its own pages: the model's attention context while serving.

    Sequences on the decode path that follow one another make one group for latent attention, which reads their pages
    where they lie.  For the others, for FP8 pages and for the dense family, a sequence's entries are copied together.
    """

    def __init__(self, cache: PagedCache, parts: Sequence[PagedTokens]) -> None:
        self._cache = cache
        page_rows = cache.entries_PLSX.shape[1] * PAGE  # over all layers
        spans = [(part, range(part.start, part.start + part.num_tokens)) for part in parts]
        positions = [position for _, span in spans for position in span]
        slots = [
            part.pages[position // PAGE] * page_rows + position % PAGE for part, span in spans for position in span
        ]
        self.positions_T = torch.tensor(positions, dtype=torch.long, device=cache.device)
        self._new_slots_T = torch.tensor(slots, dtype=torch.long, device=cache.device)
        self._groups: list[tuple[slice, PageTable | _Copied]] = []
        begin = 0
        for paged, run in groupby(parts, lambda part: part.absorbed and cache.in_place):
            together = list(run)
            for group in [together] if paged else [[part] for part in together]:
                rows = slice(begin, begin + sum(part.num_tokens for part in group))
                self._groups.append((rows, _table(group) if paged else _Copied(group[0], self._slots_of(group[0]))))
                begin = rows.stop
        tables = [where for _, where in self._groups if isinstance(where, PageTable)]
        alone = len(tables) == len(self._groups) == 1
        self.paged = PagedStep(cache.entries_PLSX, self._new_slots_T, tables[0]) if alone else None

    def _slots_of(self, part: PagedTokens) -> Tensor:
        """Rows of :meth:`PagedCache.layer` that hold positions 0 .. start + num_tokens."""
        rows_P = torch.tensor(part.pages, device=self._cache.device) * (self._cache.entries_PLSX.shape[1] * PAGE)
        slots_PS = rows_P[:, None] + torch.arange(PAGE, device=self._cache.device)
        return slots_PS.flatten()[: part.start + part.num_tokens]

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        self._cache.store(layer, self._new_slots_T, entries_TX)
        return entries_TX

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup | PagedGroup]:
        for rows, where in self._groups:
            if isinstance(where, PageTable):
                yield PagedGroup(rows, self._cache.entries_PLSX[:, layer], where)
            else:
                seen = self._cache.load(layer, where.slots)
                yield AttentionGroup(rows, 1, seen, where.part.start, where.part.absorbed)


def _table(parts: Sequence[PagedTokens]) -> PageTable:
    return PageTable.of([(part.num_tokens, part.start + part.num_tokens, part.pages) for part in parts])
