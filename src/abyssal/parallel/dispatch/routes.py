"""Index work of a dispatch in hops: which copies of tokens go on to which peer, and what is summed on the way back.

At each hop a rank *holds* copies of tokens, each with the choices (slots) that it still has to reach.  It sends a copy
once to every peer that leads to one of them, with those choices.  What the peer holds then has the same form, so two
hops are the same function twice, and the way back is each hop's sums in reverse.  All of it is a few sorts and counts;
nothing loops over tokens.

Copies are numbered by where they come from and then by token.  In the buffers of rows they lie chunk by chunk, so that
a chunk is one contiguous message: by chunk, peer, source, token.  Choices are not cut into chunks; they are small.  A
choice travels as one int32: its slot, its token's chunk, and whether a new copy begins with it.

Legend: E choices (token and slot), P copies held, Q copies sent, S sources (ranks that the copies come from), R peers,
C chunks, K chosen experts, W summands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.parallel.dispatch.order import inverse, runs, sorting

_CHUNK_BIT = 20
MOST_CHUNKS = 2**11 - 1
MOST_SLOTS = 2**19
"""On one node: what is left in an int32."""


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
    """As they travel."""
    sizes_RS2: Tensor
    """For each peer and source the copies and the choices."""
    copies_RC: Tensor
    """For each peer the copies of each chunk."""
    gather_Q: Tensor
    """Row of the buffer of each copy sent, by chunk, peer, source, token."""
    sums_PW: Tensor
    """For each row of the buffer its copies, of what comes back in the order of ``gather_Q``; see :func:`summands`."""


def tokens_held(slots_TK: Tensor, chunk_tokens: int | None) -> Held:
    """A rank's own tokens, cut into chunks."""
    tokens, choices = slots_TK.shape
    token_T = torch.arange(tokens, device=slots_TK.device)
    chunk_T = token_T // chunk_size(tokens, chunk_tokens)
    return Held(
        slots_TK.flatten(), token_T.repeat_interleave(choices), torch.zeros_like(token_T), chunk_T, place_P=token_T
    )


def chunk_size(tokens: int, chunk_tokens: int | None) -> int:
    """Tokens of a chunk: all of them if None is given, and so many at least that the chunks can be numbered."""
    return max(tokens if chunk_tokens is None else chunk_tokens, -(-tokens // MOST_CHUNKS), 1)


def copies_held(codes_E: Tensor, sizes_RS2: Tensor, num_chunks: int) -> Held:
    """What arrived from the peers."""
    copies_S = sizes_RS2[..., 0].flatten()
    source_P = runs(torch.arange(len(copies_S), device=codes_E.device), copies_S)
    codes_E = codes_E.long()
    first_E = codes_E & 1
    chunk_P = codes_E[first_E.bool()] >> _CHUNK_BIT
    slot_E = (codes_E & (1 << _CHUNK_BIT) - 1) >> 1
    return Held(slot_E, first_E.cumsum(0) - 1, source_P, chunk_P, inverse(sorting(chunk_P, num_chunks)))


def depart(held: Held, num_peers: int, slots_per_peer: int, num_sources: int, num_chunks: int) -> Departure:
    """Each copy once to every peer that leads to one of its slots."""
    peer_E = held.slot_E // slots_per_peer
    order_E = sorting(peer_E, num_peers)
    peer_E, copy_E = peer_E.index_select(0, order_E), held.copy_E.index_select(0, order_E)
    first_E = torch.ones_like(peer_E, dtype=torch.bool)
    first_E[1:] = (peer_E[1:] != peer_E[:-1]) | (copy_E[1:] != copy_E[:-1])
    peer_Q, copy_Q = peer_E[first_E], copy_E[first_E]
    chunk_Q = held.chunk_P.index_select(0, copy_Q)

    sizes_RS2 = torch.stack(
        [
            torch.bincount(
                peers * num_sources + held.source_P.index_select(0, copies), minlength=num_peers * num_sources
            )
            for peers, copies in ((peer_Q, copy_Q), (peer_E, copy_E))
        ],
        1,
    ).view(num_peers, num_sources, 2)
    copies_RC = torch.bincount(peer_Q * num_chunks + chunk_Q, minlength=num_peers * num_chunks).view(num_peers, -1)
    slot_E = held.slot_E.index_select(0, order_E) % slots_per_peer
    chunk_E = held.chunk_P.index_select(0, copy_E)
    codes_E = (chunk_E << _CHUNK_BIT) + slot_E * 2 + first_E
    gather_Q = held.place_P.index_select(0, copy_Q.index_select(0, sorting(chunk_Q, num_chunks)))
    sums_PW = summands(gather_Q, len(held.place_P))
    return Departure(order_E, codes_E.int(), sizes_RS2, copies_RC, gather_Q, sums_PW)


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
