"""All-to-all of uneven pieces in one group: what each rank sends to each other, started and waited for apart.

Over gloo these are point-to-point messages, every receive posted before the first send.  Its own all-to-all sends
first.  A rank that comes later than its peer then finds the peer ready and begins to send at once; the word that it is
ready too queues behind its data on the same connection, and the peer, which may not send before it has that word,
begins when all of it is through: each direction waits for the other, and an exchange takes twice its time.

NCCL's all-to-all is used as it is: there one kernel does both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from torch import Tensor, distributed


class Work(Protocol):
    """Communication under way."""

    def wait(self) -> object: ...


class Works:
    """Several, waited for as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def start(pieces: Sequence[tuple[Tensor, Tensor]], received: Sequence[int], sent: Sequence[int], group: Any) -> Work:
    """Begin to send rows to every rank of ``group`` and to receive rows of every one, own rows too.

    Args:
        pieces: pairs of a tensor to fill, of sum(received) rows, and one to send, of sum(sent), both contiguous; they
            may be used again once the work is waited for.
        received: rows from each rank, as they lie in what is filled.
        sent: rows to each rank, as they lie in what is sent.
    """
    if pieces[0][0].is_cuda:
        works: list[Any] = []
        for target, rows in pieces:
            splits = [*received], [*sent]
            works.append(distributed.all_to_all_single(target, rows, *splits, group=group, async_op=True))
        return Works(works)
    arriving = [_by_peer(target, received) for target, _ in pieces]
    leaving = [_by_peer(rows, sent) for _, rows in pieces]
    own = group.rank()
    works = [group.recv([part], peer, 0) for parts in arriving for peer, part in parts.items() if peer != own]
    works += [group.send([part], peer, 0) for parts in leaving for peer, part in parts.items() if peer != own]
    for to, what in zip(arriving, leaving, strict=True):
        if own in to:
            to[own].copy_(what[own])
    return Works(works)


def _by_peer(tensor: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """Each peer's rows; who has none gets no message."""
    begins = [0, *accumulate(counts)]
    return {peer: tensor[begin:end] for peer, (begin, end) in enumerate(pairwise(begins)) if begin < end}
