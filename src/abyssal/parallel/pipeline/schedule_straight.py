"""Schedules of one chunk a rank, all micro-batches from rank 0 to the last: GPipe, 1F1B and ZB1P.

- *GPipe* [arXiv 1811.06965]: all forwards, then all backwards.  A rank holds the activations of every micro-batch.
- *1F1B* [arXiv 1806.03377, 2104.04473]: rank r of P begins with P - r forwards, and from then on a forward waits for a
  backward.  The same bubble, but no rank holds more than P - r micro-batches.
- *ZB1P* (ZB-H1 in arXiv 2401.10241): 1F1B with the backward cut in two.  Only the gradient of the input is waited for
  by another rank; that of the weights fills what was bubble.  Rank r lets the weights' part fall r micro-batches
  behind, as many as it begins with fewer forwards, so that it holds P micro-batches, no more than 1F1B's first rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from abyssal.parallel.pipeline.schedule_record import Action, Kind, Schedule, Work


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards."""
    order = list(_alternating(num_micro_batches, num_micro_batches))
    return _straight("gpipe", num_micro_batches, [order] * num_ranks)


def one_forward_one_backward(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B."""
    orders = [list(_alternating(num_ranks - rank, num_micro_batches)) for rank in range(num_ranks)]
    return _straight("1f1b", num_micro_batches, orders)


def zero_bubble(num_ranks: int, num_micro_batches: int) -> Schedule:
    """ZB1P."""
    orders = [list(_split(num_ranks - rank, rank, num_micro_batches)) for rank in range(num_ranks)]
    return _straight("zb1p", num_micro_batches, orders)


def _alternating(ahead: int, num_micro_batches: int) -> Iterator[tuple[Kind, int]]:
    """``ahead`` forwards, then each backward before the next forward."""
    for forward in range(num_micro_batches + ahead):
        if forward >= ahead:
            yield "B", forward - ahead
        if forward < num_micro_batches:
            yield "F", forward


def _split(ahead: int, behind: int, num_micro_batches: int) -> Iterator[tuple[Kind, int]]:
    """The same with the backward in two, the weights' part ``behind`` micro-batches after the input's."""
    for kind, micro_batch in _alternating(ahead, num_micro_batches):
        if kind == "F":
            yield kind, micro_batch
            continue
        yield "I", micro_batch
        if micro_batch >= behind:
            yield "W", micro_batch - behind
    for micro_batch in range(max(0, num_micro_batches - behind), num_micro_batches):
        yield "W", micro_batch


def _straight(name: str, num_micro_batches: int, orders: list[list[tuple[Kind, int]]]) -> Schedule:
    return Schedule(
        name=name,
        num_ranks=len(orders),
        num_micro_batches=num_micro_batches,
        num_stages=len(orders),
        chunks=tuple((rank,) for rank in range(len(orders))),
        actions=tuple(
            tuple(Action((Work(kind, 0, rank, micro_batch),)) for kind, micro_batch in order)
            for rank, order in enumerate(orders)
        ),
    )
