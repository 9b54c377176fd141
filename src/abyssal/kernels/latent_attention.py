"""Absorbed latent attention: queries folded into the latent space over the cached entries of their sequences.

Every head reads the same entries, whose first ``value_dim`` values are also what it sums.  The entries of a sequence
lie together (:func:`latent_attention`), or in pages of a cache that a table names (:func:`paged_latent_attention`):
there a step's sequences, of any lengths, go in one call that reads the pages where they are.

Without gradients CPU takes ``csrc/latent_attention.cpp``.  It keeps the weights in FP32, where torch's form rounds them
to the dtype of the entries before the second product, and a query's result does not depend, in any bit, on other
queries, heads or sequences, on pages or one piece, nor on the number of threads.

Legend: B sequences, S queries, L keys, H heads, C width of queries and entries, T queries (flat), P pages, X = C.
Error bound: :func:`error_bound` for the native form.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.attention import causal_mask
from abyssal.kernels.native import BAD_SHAPE, DTYPE_CODES, OK, native_library, openmp_fork

_pack = struct.Struct("=19qd").pack  # the record `LatentAttentionArguments` of csrc/operators.h


@dataclass(frozen=True)
class PageTable:
    """The pages of several sequences, each with its newest tokens as queries."""

    sequences_B3: Tensor
    """int64: number of queries, number of entries (the last query sees all of them), first page in ``pages_N``."""
    pages_N: Tensor
    """int64: page numbers of all sequences, one sequence after another."""

    @staticmethod
    def of(sequences: Sequence[tuple[int, int, Sequence[int]]]) -> PageTable:
        """From (queries, entries, pages) of each sequence."""
        rows, pages = [], []
        for queries, entries, its_pages in sequences:
            rows += [queries, entries, len(pages)]
            pages += its_pages
        return PageTable(torch.tensor(rows, dtype=torch.long).view(-1, 3), torch.tensor(pages, dtype=torch.long))


def latent_attention(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, past: int, scale: float) -> Tensor:
    """Attention of sequences of one shape, each in one piece; query i sees entries 0 .. past + i.

    Returns (B, S, H, value_dim): the attended latent of each head.  Scores and softmax are in FP32 at least.
    """
    seen = past + q_BSHC.shape[1]
    if seen < latent_BLC.shape[1]:  # no query sees the entries after the last query's own
        latent_BLC = latent_BLC[:, :seen]
    out_BSHC = native(q_BSHC, latent_BLC, value_dim, scale)
    return reference(q_BSHC, latent_BLC, value_dim, past, scale) if out_BSHC is None else out_BSHC


def reference(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, past: int, scale: float) -> Tensor:
    """The definition, differentiable by autograd."""
    batch, num_queries, heads, width = q_BSHC.shape
    wide = torch.promote_types(q_BSHC.dtype, torch.float32)
    rows = q_BSHC.reshape(batch, num_queries * heads, width)
    scores = (rows @ latent_BLC.transpose(1, 2)).to(wide).mul_(scale)
    if num_queries > 1:
        mask = causal_mask(num_queries, latent_BLC.shape[1], past, rows.device).repeat_interleave(heads, 0)
        scores = scores.masked_fill_(~mask, float("-inf"))
    weights = scores.softmax(-1).to(q_BSHC.dtype)
    return (weights @ latent_BLC[..., :value_dim]).view(batch, num_queries, heads, value_dim)


def paged_latent_attention(
    q_THC: Tensor, entries_PSX: Tensor, table: PageTable, value_dim: int, scale: float
) -> Tensor:
    """Attention of all sequences of ``table``, their queries one sequence after another: (T, H, value_dim).

    ``entries_PSX`` are all pages of one layer, of S entries each; the table says which are whose.
    """
    out_THC = paged_native(q_THC, entries_PSX, table, value_dim, scale)
    return paged_reference(q_THC, entries_PSX, table, value_dim, scale) if out_THC is None else out_THC


def paged_reference(q_THC: Tensor, entries_PSX: Tensor, table: PageTable, value_dim: int, scale: float) -> Tensor:
    """Each sequence's pages copied together, one sequence after another."""
    parts, begin, page_tokens = [], 0, entries_PSX.shape[1]
    for queries, length, first in table.sequences_B3.tolist():
        pages = table.pages_N[first : first - (-length // page_tokens)].to(entries_PSX.device)
        latent_1LC = entries_PSX[pages].flatten(0, 1)[None, :length]
        q_1SHC = q_THC[None, begin : begin + queries]
        parts.append(latent_attention(q_1SHC, latent_1LC, value_dim, length - queries, scale)[0])
        begin += queries
    return torch.cat(parts) if parts else q_THC.new_empty((0, q_THC.shape[1], value_dim))


def native(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, scale: float, *, isa_limit: int = -1) -> Tensor | None:
    """The C++ on sequences in one piece: a page each; None where it does not apply.

    The last query sees every entry, the one before it all but one, and so on.  Otherwise as :func:`paged_native`.
    """
    (batch, num_queries, heads, _), (sequences, length, _) = q_BSHC.shape, latent_BLC.shape
    if sequences != batch or length < num_queries:
        return None
    if latent_BLC.stride(2) != 1:
        latent_BLC = latent_BLC.contiguous()
    table = PageTable.of([(num_queries, length, (sequence,)) for sequence in range(batch)])
    q_THC = q_BSHC.reshape(-1, *q_BSHC.shape[2:])
    out_THC = paged_native(q_THC, latent_BLC, table, value_dim, scale, isa_limit=isa_limit)
    return None if out_THC is None else out_THC.view(batch, num_queries, heads, value_dim)


def paged_native(
    q_THC: Tensor, entries_PSX: Tensor, table: PageTable, value_dim: int, scale: float, *, isa_limit: int = -1
) -> Tensor | None:
    """The C++, within :func:`error_bound`; None where it does not apply.

    It takes CPU tensors in FP32 or BF16 (query and entries each), contiguous values of an entry, and has no backward.
    ``isa_limit`` is the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library = native_library()
    code, entries_code = DTYPE_CODES.get(q_THC.dtype), DTYPE_CODES.get(entries_PSX.dtype)
    if library is None or code is None or entries_code is None or not (q_THC.is_cpu and entries_PSX.is_cpu):
        return None
    (queries, heads, width), (num_pages, page_tokens, entry_width) = q_THC.shape, entries_PSX.shape
    page_stride, stride, unit = entries_PSX.stride()
    if entry_width != width or unit != 1 or not page_tokens:
        return None
    if torch.is_grad_enabled() and (q_THC.requires_grad or entries_PSX.requires_grad):
        return None
    q_THC = q_THC.contiguous()
    out_THC = q_THC.new_empty((queries, heads, value_dim))
    tables = table.sequences_B3.data_ptr(), table.pages_N.data_ptr()
    pointers = q_THC.data_ptr(), entries_PSX.data_ptr(), out_THC.data_ptr(), *tables
    sizes = len(table.sequences_B3), heads, width, value_dim
    sizes += num_pages, page_tokens, page_stride, stride, len(table.pages_N)
    record = _pack(*pointers, code, entries_code, *sizes, torch.get_num_threads(), openmp_fork(), isa_limit, scale)
    status = library.abyssal_latent_attention(record)
    assert status in (OK, BAD_SHAPE), f"abyssal_latent_attention returned {status}"
    return out_THC if status == OK else None


def error_bound(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, scale: float) -> Tensor:
    """Largest distance (B, S, H, 1), in FP64, of :func:`native` from exact arithmetic.

    With u = 2^-24: a score is off by at most d = (C + 2) u · scale · Σ |q entry|, which moves its weight by a factor
    within e^±d and the normalised weight within e^±2d; weighting and summing L values adds (L + 4) u; the result is
    rounded to the dtype of ``q``.  All of it relative to the largest value of the entries.
    """
    unit, width, length = 2.0**-24, q_BSHC.shape[-1], latent_BLC.shape[1]
    sums = torch.einsum("bshc,blc->bshl", q_BSHC.double().abs(), latent_BLC.double().abs())
    score_error = (width + 2) * unit * abs(scale) * sums.amax(-1, keepdim=True)
    largest = latent_BLC[..., :value_dim].double().abs().max()
    rounding = torch.finfo(q_BSHC.dtype).eps / 2
    summed = torch.expm1(2 * score_error) + (length + 4) * unit * torch.exp(2 * score_error)
    return (summed + rounding * (1 + summed)) * largest + torch.finfo(torch.float32).tiny
