"""Two hops of rows, out and back: one chunk is on the first hop while the one before is on the second.

Each hop is an all-to-all in a group of its own, so the two go on at once.  A hop in a group of one rank is no hop: out,
the rows are read where they are.

Legend: T tokens, D model (or bytes of a token), E choices, P rows of a buffer, Q rows sent, R peers, S sources,
C chunks, W summands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.kernels.row_sums import row_sums
from abyssal.parallel.dispatch.checks import check_fingerprints
from abyssal.parallel.dispatch.exchange import Peers, Work, finished, wait_for
from abyssal.parallel.dispatch.links import LinkBytes
from abyssal.parallel.dispatch.order import inverse
from abyssal.parallel.dispatch.routes import Held, copies_held, depart


@dataclass(frozen=True)
class Rows:
    """Rows of a buffer that one all-to-all sends or receives, for each chunk."""

    by_peer: list[list[int]]
    """For each chunk the rows of each peer."""
    chunks: list[slice]
    """Where each chunk lies in the buffer."""

    @classmethod
    def of(cls, copies_RC: Tensor) -> Rows:
        by_peer = copies_RC.t().tolist()
        ends = copies_RC.sum(0).cumsum(0).tolist()
        return cls(by_peer, [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)])

    def __len__(self) -> int:
        return self.chunks[-1].stop


@dataclass(frozen=True)
class Hop:
    """One hop from this rank, and what it receives on the same hop."""

    peers: Peers
    sent: Rows
    received: Rows
    choices_sent: list[int]
    choices_received: list[int]
    gather_Q: Tensor
    sums_PW: Tensor
    order_E: Tensor
    inverse_E: Tensor
    most_tokens: int
    """Of any rank from which copies may come this way."""

    @property
    def num_chunks(self) -> int:
        return len(self.sent.chunks)

    def weights_out(self, weights_E: Tensor | None, counted: LinkBytes) -> tuple[Tensor | None, Work | None]:
        """Begin to send the weight of each choice."""
        if weights_E is None:
            return None, None
        weights_E = weights_E.index_select(0, self.order_E)
        return self.peers.exchange(weights_E, self.choices_sent, self.choices_received, counted)

    def weights_back(self, weights_E: Tensor | None, counted: LinkBytes) -> tuple[Tensor | None, Work | None]:
        """Begin to send them back; they arrive in the order in which they were sent."""
        if weights_E is None:
            return None, None
        return self.peers.exchange(weights_E, self.choices_received, self.choices_sent, counted)

    def weights_returned(self, weights_E: Tensor | None) -> Tensor | None:
        """In the order that they had before."""
        return None if weights_E is None else weights_E.index_select(0, self.inverse_E)


def open_hop(
    peers: Peers,
    held: Held,
    slots_per_peer: int,
    num_sources: int,
    num_chunks: int,
    tokens: int,
    own: int,
    counted: LinkBytes,
) -> tuple[Hop, Held]:
    """Tell the peers what they will get, and learn what arrives from them.

    Ranks may have cut their tokens into different numbers of chunks; the hop has as many as the one with most.

    Args:
        num_chunks: of what is held here.
        tokens: the most tokens of any rank that this one knows of.
        own: this rank's fingerprint of the plan.
    """
    departure = depart(held, peers.size, slots_per_peer, num_sources, num_chunks)
    sizes_RS2, ones = departure.sizes_RS2, [1] * peers.size
    about = sizes_RS2.new_tensor([[num_chunks, tokens, own]]).expand(peers.size, 3)
    message = torch.cat([sizes_RS2.flatten(1), about], 1)
    answers = finished(*peers.exchange(message, ones, ones, counted))
    check_fingerprints(own, answers[:, -1].tolist())
    most_chunks, most_tokens = answers[:, -3:-1].amax(0).tolist()
    arriving_RS2 = answers[:, :-3].view_as(sizes_RS2)
    choices = sizes_RS2[..., 1].sum(1).tolist(), arriving_RS2[..., 1].sum(1).tolist()
    codes_E = finished(*peers.exchange(departure.codes_E, *choices, counted))
    arrived = copies_held(codes_E, arriving_RS2, most_chunks)
    group_P = arrived.source_P // num_sources * most_chunks + arrived.chunk_P
    arrived_RC = torch.bincount(group_P, minlength=peers.size * most_chunks).view(peers.size, -1)
    departing_RC = functional.pad(departure.copies_RC, (0, most_chunks - num_chunks))
    hop = Hop(
        peers,
        Rows.of(departing_RC),
        Rows.of(arrived_RC),
        *choices,
        departure.gather_Q,
        departure.sums_PW,
        departure.order_E,
        inverse(departure.order_E),
        most_tokens,
    )
    return hop, arrived


def travel_out(
    across: Hop, inside: Hop, x_TD: Tensor, weights_E: Tensor | None, counted: LinkBytes
) -> tuple[Tensor, Tensor | None]:
    """Tokens to the ranks of their experts: a copy each, in the inside hop's order, and the weight of each choice."""
    weights, work = across.weights_out(weights_E, counted)
    first = _Out(across, x_TD, counted)
    second = _Out(inside, first.target, counted)
    works = _chain(first, second)
    weights, work = inside.weights_out(finished(weights, work), counted)
    for each in (*works, work):
        wait_for(each)
    return second.target, weights


def travel_back(
    across: Hop,
    inside: Hop,
    rows: Callable[[slice], Tensor],
    like_AD: Tensor,
    weights_E: Tensor | None,
    counted: LinkBytes,
) -> tuple[Tensor, Tensor | None]:
    """The reverse: sums over ranks where tokens were handed on, over nodes at home: (T, D), and the weights.

    Args:
        rows: makes the rows of that slice of the inside hop's copies.
        like_AD: a tensor of their width, dtype and device.
    """
    weights, work = inside.weights_back(weights_E, counted)
    first = _Back(inside, rows, like_AD, counted)
    second = _Back(across, lambda chunk: row_sums(first.target, inside.sums_PW[chunk]), like_AD, counted)
    works = _chain(first, second)
    weights = inside.weights_returned(finished(weights, work))
    weights, work = across.weights_back(weights, counted)
    for each in (*works, work):
        wait_for(each)
    return row_sums(second.target, across.sums_PW), across.weights_returned(weights)


class _Out:
    """A hop towards the experts, from one buffer into another."""

    def __init__(self, hop: Hop, source: Tensor, counted: LinkBytes) -> None:
        self._hop, self._source, self._counted = hop, source, counted
        self.num_chunks = hop.num_chunks
        self._stays = hop.peers.size == 1
        self.target = source if self._stays else source.new_empty(len(hop.received), source.shape[1])

    def prepare(self, chunk: int) -> Tensor:
        """The rows to be sent."""
        rows = self._hop.sent.chunks[chunk]
        return self._source[rows] if self._stays else self._source.index_select(0, self._hop.gather_Q[rows])

    def start(self, chunk: int, rows: Tensor) -> Work | None:
        hop = self._hop
        out = None if self._stays else self.target[hop.received.chunks[chunk]]
        return hop.peers.exchange(rows, hop.sent.by_peer[chunk], hop.received.by_peer[chunk], self._counted, out)[1]


class _Back:
    """A hop towards the tokens' ranks; its target has a row of zeros after the others."""

    def __init__(self, hop: Hop, prepare: Callable[[slice], Tensor], like_AD: Tensor, counted: LinkBytes) -> None:
        self._hop, self._prepare, self._counted = hop, prepare, counted
        self.num_chunks = hop.num_chunks
        self.target = like_AD.new_empty(len(hop.sent) + 1, like_AD.shape[1])
        self.target[-1] = 0

    def prepare(self, chunk: int) -> Tensor:
        """The rows to be sent."""
        return self._prepare(self._hop.received.chunks[chunk])

    def start(self, chunk: int, rows: Tensor) -> Work | None:
        hop = self._hop
        out = self.target[hop.sent.chunks[chunk]]
        return hop.peers.exchange(rows, hop.received.by_peer[chunk], hop.sent.by_peer[chunk], self._counted, out)[1]


def _chain(first: _Out | _Back, second: _Out | _Back) -> Sequence[Work | None]:
    """Every chunk through the first hop and on to the second; the works of the second."""
    works = []
    crossing = first.start(0, first.prepare(0))
    for chunk in range(max(first.num_chunks, second.num_chunks)):
        ready = first.prepare(chunk + 1) if chunk + 1 < first.num_chunks else None
        wait_for(crossing)
        crossing = None if ready is None else first.start(chunk + 1, ready)
        if chunk < second.num_chunks:
            works.append(second.start(chunk, second.prepare(chunk)))
    return works


def with_zero_row(rows_AD: Tensor) -> Tensor:
    """With one row of zeros after them."""
    return torch.cat([rows_AD, rows_AD.new_zeros(1, rows_AD.shape[1])])
