"""Index work of a dispatch in hops: which copies of tokens go on to which peer, and what is summed on the way back.

At each hop a rank *holds* copies of tokens, each with the choices (slots) that it still has to reach.  It sends a copy
once to every peer that leads to one of them, with those choices.  What the peer holds then has the same form, so two
hops are the same function twice, and the way back is each hop's sums in reverse.  All of it is a few sorts and counts;
nothing loops over tokens.

Copies are numbered by where they come from and then by token.  In the buffers of rows they lie chunk by chunk, so that
a chunk is one contiguous message: by chunk, peer, source, token.  Choices are not cut into chunks; they are small.

Legend: E choices (token and slot), P copies held, Q copies sent, S sources (ranks that the copies come from), R peers,
C chunks, K chosen experts, W summands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.parallel.dispatch.order import inverse, runs, sorting


@dataclass(frozen=True)
class Held:
    """Copies of tokens on a rank and the choices that each carries, in order of source, token and choice."""

    slot_E: Tensor
    """Slot of each choice, counted among those that can be reached from here."""
    copy_E: Tensor
    """The copy that carries it."""
    source_P: Tensor
    chunk_P: Tensor
    place_P: Tensor
    """Row of each copy in the buffer."""


@dataclass(frozen=True)
class Departure:
    """How the copies on a rank go on to its peers."""

    order_E: Tensor
    """Choices in the order in which they are sent: by peer, source, token, choice."""
    codes_E: Tensor
    """int32 that travel: twice the slot counted on the peer's side, plus 1 where a new copy begins."""
    sizes_RSC: Tensor
    """For each peer and source the copies of each chunk and, as one element more, the choices."""
    gather_Q: Tensor
    """Row of the buffer of each copy sent, by chunk, peer, source, token."""
    sums_PW: Tensor
    """For each row of the buffer its copies, of what comes back in the order of ``gather_Q``; see :func:`summands`."""


def tokens_held(slots_TK: Tensor, num_chunks: int) -> Held:
    """A rank's own tokens, cut into chunks of equal size."""
    tokens, choices = slots_TK.shape
    token_T = torch.arange(tokens, device=slots_TK.device)
    chunk_T = token_T // max(-(-tokens // num_chunks), 1)
    return Held(
        slots_TK.flatten(), token_T.repeat_interleave(choices), torch.zeros_like(token_T), chunk_T, place_P=token_T
    )


def copies_held(codes_E: Tensor, sizes_RSC: Tensor) -> Held:
    """What arrived from the peers."""
    sizes_SC = sizes_RSC.flatten(0, 1)
    copies_SC, device = sizes_SC[:, :-1], codes_E.device
    sources, chunks = copies_SC.shape
    chunk_P = runs(torch.arange(chunks, device=device).repeat(sources), copies_SC.flatten())
    source_P = runs(torch.arange(sources, device=device), copies_SC.sum(1))
    codes_E = codes_E.long()
    return Held(codes_E >> 1, (codes_E & 1).cumsum(0) - 1, source_P, chunk_P, inverse(sorting(chunk_P, chunks)))


def depart(held: Held, num_peers: int, slots_per_peer: int, num_sources: int, num_chunks: int) -> Departure:
    """Each copy once to every peer that leads to one of its slots."""
    peer_E = held.slot_E // slots_per_peer
    order_E = sorting(peer_E, num_peers)
    peer_E, copy_E = peer_E.index_select(0, order_E), held.copy_E.index_select(0, order_E)
    first_E = torch.ones_like(peer_E, dtype=torch.bool)
    first_E[1:] = (peer_E[1:] != peer_E[:-1]) | (copy_E[1:] != copy_E[:-1])
    peer_Q, copy_Q = peer_E[first_E], copy_E[first_E]
    chunk_Q = held.chunk_P.index_select(0, copy_Q)

    group_Q = peer_Q * num_sources + held.source_P.index_select(0, copy_Q)
    group_E = peer_E * num_sources + held.source_P.index_select(0, copy_E)
    copies = torch.bincount(group_Q * num_chunks + chunk_Q, minlength=num_peers * num_sources * num_chunks)
    choices = torch.bincount(group_E, minlength=num_peers * num_sources)
    sizes_RSC = torch.cat(
        [copies.view(num_peers, num_sources, num_chunks), choices.view(num_peers, num_sources, 1)], -1
    )
    codes_E = (held.slot_E.index_select(0, order_E) % slots_per_peer) * 2 + first_E
    gather_Q = held.place_P.index_select(0, copy_Q.index_select(0, sorting(chunk_Q, num_chunks)))
    return Departure(order_E, codes_E.int(), sizes_RSC, gather_Q, summands(gather_Q, len(held.place_P)))


def summands(row_I: Tensor, num_rows: int, place_I: Tensor | None = None) -> Tensor:
    """(num_rows, W): of each row the items i with ``row_I[i]`` = row, ascending, filled up with the number of items.

    So the items' sums are ``row_sums`` of a buffer that has one row of zeros after them.

    Args:
        place_I: where the items lie in that buffer; in order if not given.
    """
    counts = torch.bincount(row_I, minlength=num_rows)
    order_I = sorting(row_I, num_rows)
    row_I = row_I.index_select(0, order_I)
    turn_I = torch.arange(len(row_I), device=row_I.device) - (counts.cumsum(0) - counts).index_select(0, row_I)
    width = int(counts.max()) if len(row_I) else 1
    index = torch.full((num_rows, width), len(row_I), device=row_I.device)
    index[row_I, turn_I] = order_I if place_I is None else place_I.index_select(0, order_I)
    return index
