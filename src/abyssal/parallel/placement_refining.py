"""Small changes that make the busiest rank less busy, the best first, until none does.

Two kinds: two ranks exchange a slot each (two weights travel), or a slot changes from an expert that has several to one
that the busiest rank holds (one weight travels; all that expert's slots become lighter, the other's heavier).  A change
is taken if every rank that it touches ends less busy than the busiest was, so ranks' loads, sorted, always fall and the
search ends.  Neither puts an expert on a rank twice.

Legend: M problems, E experts, R ranks, Q slots of a rank, S = R·Q slots, F experts that have several slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abyssal.parallel.placement_packing import Integers, held, rank_loads

_NEVER = np.iinfo(np.int64).max
_MOST_GIVERS = 16
"""Experts that are asked for a slot, those whose slots would stay the lightest: others are seldom better."""


def refine(slots_MRQ: Integers, loads_ME: Integers, enough_M: Integers) -> None:
    """Make changes, in place, to each problem until its busiest rank is no busier than ``enough_M`` or none helps."""
    active = np.arange(len(slots_MRQ))
    while True:
        busiest = rank_loads(slots_MRQ[active], loads_ME[active]).max(axis=1, initial=0)
        active = active[busiest > enough_M[active]]
        if not len(active):
            return
        active = active[_improved(slots_MRQ, loads_ME, active)]


def _improved(slots_MRQ: Integers, loads_ME: Integers, active: Integers) -> Integers:
    """Make the best change of each active problem; places in ``active`` of those that had one."""
    state = _State.of(slots_MRQ[active], loads_ME[active])
    busiest = state.ranks_MR[state.rows, state.busiest]
    after_exchange, one, other = _exchange(state)
    after_copy, slot, expert = _copy(state)
    copies = (after_copy <= after_exchange) & (after_copy < busiest)
    exchanges = (after_exchange < after_copy) & (after_exchange < busiest)
    flat_MS = state.flat_MS.copy()
    flat_MS[copies, slot[copies]] = expert[copies]
    flat_MS[exchanges, one[exchanges]] = state.flat_MS[exchanges, other[exchanges]]
    flat_MS[exchanges, other[exchanges]] = state.flat_MS[exchanges, one[exchanges]]
    slots_MRQ[active] = flat_MS.reshape(len(active), *slots_MRQ.shape[1:])
    return np.nonzero(copies | exchanges)[0]


@dataclass(frozen=True)
class _State:
    """What both kinds of change are weighed by."""

    rows: Integers
    flat_MS: Integers
    rank_size: int
    loads_ME: Integers
    held_MRE: Integers
    counts_ME: Integers
    weights_ME: Integers
    ranks_MR: Integers
    busiest: Integers
    """The busiest rank of each problem."""

    @classmethod
    def of(cls, slots_MRQ: Integers, loads_ME: Integers) -> _State:
        problems = len(slots_MRQ)
        flat_MS = slots_MRQ.reshape(problems, -1)
        held_MRE = held(slots_MRQ, loads_ME.shape[1])
        counts_ME = held_MRE.sum(axis=1)
        weights_ME = loads_ME // counts_ME
        ranks_MR = np.take_along_axis(weights_ME, flat_MS, axis=1).reshape(slots_MRQ.shape).sum(axis=2)
        return cls(
            np.arange(problems),
            flat_MS,
            slots_MRQ.shape[2],
            loads_ME,
            held_MRE,
            counts_ME,
            weights_ME,
            ranks_MR,
            ranks_MR.argmax(axis=1),
        )

    @property
    def own_MQ(self) -> Integers:
        """The experts of the busiest rank."""
        slots = self.busiest[:, None] * self.rank_size + np.arange(self.rank_size)
        return self.flat_MS[self.rows[:, None], slots]


def _exchange(state: _State) -> tuple[Integers, Integers, Integers]:
    """The busier of two ranks after the best exchange with the busiest, and the two slots."""
    rows, flat_MS, rank_size = state.rows, state.flat_MS, state.rank_size
    num_slots = flat_MS.shape[1]
    if rank_size == 1:
        return np.full(len(rows), _NEVER), rows, rows
    own_MQ = state.own_MQ
    weights_MS = np.take_along_axis(state.weights_ME, flat_MS, axis=1)
    less_MQS = np.take_along_axis(state.weights_ME, own_MQ, axis=1)[:, :, None] - weights_MS[:, None, :]
    load_M11 = state.ranks_MR[rows, state.busiest][:, None, None]
    other_MS = np.repeat(state.ranks_MR, rank_size, axis=1)
    after_MQS = np.maximum(load_M11 - less_MQS, other_MS[:, None, :] + less_MQS)
    refused_MQR = state.held_MRE[rows[:, None], :, own_MQ] > 0
    refused_MS = state.held_MRE[rows[:, None], state.busiest[:, None], flat_MS] > 0
    after_MQS[np.repeat(refused_MQR, rank_size, axis=2) | refused_MS[:, None, :]] = _NEVER
    flat = after_MQS.reshape(len(rows), -1)
    best = flat.argmin(axis=1)
    place, slot = np.divmod(best, num_slots)
    return flat[rows, best], state.busiest * rank_size + place, slot


def _copy(state: _State) -> tuple[Integers, Integers, Integers]:
    """The busiest of the ranks touched by the best change of a slot, the slot, and its new expert."""
    rows, own_MQ, held_MRE, loads_ME = state.rows, state.own_MQ, state.held_MRE, state.loads_ME
    several = min(int((state.counts_ME > 1).sum(axis=1).max()), _MOST_GIVERS)
    if several == 0:
        return np.full(len(rows), _NEVER), rows, rows
    heavier_ME = np.where(state.counts_ME > 1, loads_ME // np.maximum(state.counts_ME - 1, 1), _NEVER)
    giver_MF = np.argsort(heavier_ME, axis=1, kind="stable")[:, :several]
    counts_MF = np.take_along_axis(state.counts_ME, giver_MF, axis=1)
    heavier_MF = np.take_along_axis(loads_ME, giver_MF, axis=1) // np.maximum(counts_MF - 1, 1)
    lighter_MQ = np.take_along_axis(loads_ME // (state.counts_ME + 1), own_MQ, axis=1)
    own_MQR = held_MRE[rows[:, None], :, own_MQ]
    giver_MFR = held_MRE[rows[:, None], :, giver_MF]
    less_MQR = own_MQR * (np.take_along_axis(state.weights_ME, own_MQ, axis=1) - lighter_MQ)[:, :, None]
    more_MFR = giver_MFR * (heavier_MF - np.take_along_axis(state.weights_ME, giver_MF, axis=1))[:, :, None]
    touched = (own_MQR > 0)[:, :, None, :] | (giver_MFR > 0)[:, None, :, :]
    after = state.ranks_MR[:, None, None, :] - less_MQR[:, :, None, :] + more_MFR[:, None, :, :]
    changed = after + lighter_MQ[:, :, None, None] - heavier_MF[:, None, :, None]
    worst = np.maximum(_largest_other(np.where(touched, after, -1)), changed)
    allowed = (giver_MFR > 0)[:, None, :, :] & (own_MQR == 0)[:, :, None, :] & (counts_MF > 1)[:, None, :, None]
    flat = np.where(allowed, worst, _NEVER).reshape(len(rows), -1)
    best = flat.argmin(axis=1)
    place, giver, rank = np.unravel_index(best, worst.shape[1:])
    given = giver_MF[rows, giver]
    slots_MQ = rank[:, None] * state.rank_size + np.arange(state.rank_size)
    slot = (state.flat_MS[rows[:, None], slots_MQ] == given[:, None]).argmax(axis=1)
    return flat[rows, best], rank * state.rank_size + slot, own_MQ[rows, place]


def _largest_other(values: Integers) -> Integers:
    """At each place of the last axis, the largest value of the others."""
    largest = values.argmax(axis=-1)[..., None]
    top = np.take_along_axis(values, largest, axis=-1)
    rest = values.copy()
    np.put_along_axis(rest, largest, -1, axis=-1)
    return np.where(np.arange(values.shape[-1]) == largest, rest.max(axis=-1, keepdims=True), top)
