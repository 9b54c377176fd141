"""When everything of a schedule happens, given how long each work and message takes; free of torch.

Ranks run their actions in the order given, one at a time; an action starts when its rank is free and what it needs has
arrived.  A message leaves when the action that made it ends, arrives ``send`` later, holds nobody up and shares its
link with nobody.  Both works of a pair start together and end together.

So times are a walk over the actions in an order of dependence; there is no clock and nothing random but what the caller
gives.  The trade-off: links that queue are not modelled here, they are the cost model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from abyssal.parallel.pipeline.schedule_check import Key, execution_order, made, needed
from abyssal.parallel.pipeline.schedule_record import Action, Schedule, Work

Duration = float | Callable[[Work, int], float]
"""A number, or a function of a work and its rank."""


@dataclass(frozen=True)
class Times:
    """How long things take, in any unit."""

    forward: Duration = 1.0
    input: Duration = 1.0
    """Part of the backward that gives the gradient of the input."""
    weight: Duration = 1.0
    """Part that gives the gradients of the weights; a whole backward takes both."""
    pair: float | Callable[[Action, int], float] | None = None
    """A forward and a whole backward overlapped; None: as long as one after the other."""
    send: Duration = 0.0
    """From the end of a forward, or of a backward, to its arrival at another rank."""

    def of(self, action: Action, rank: int) -> float:
        """How long ``rank`` takes for ``action``."""
        if action.is_pair and self.pair is not None:
            return self.pair(action, rank) if callable(self.pair) else self.pair
        return sum(self._of_work(work, rank) for work in action.works)

    def _of_work(self, work: Work, rank: int) -> float:
        parts = {"F": (self.forward,), "I": (self.input,), "W": (self.weight,), "B": (self.input, self.weight)}
        return sum(_value(part, work, rank) for part in parts[work.kind])

    def of_message(self, work: Work, rank: int) -> float:
        """How long what ``work`` made travels from ``rank``."""
        return _value(self.send, work, rank)


def _value(duration: Duration, work: Work, rank: int) -> float:
    return duration(work, rank) if callable(duration) else duration


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each action of a schedule ran."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """By rank, in order."""

    @cached_property
    def makespan(self) -> float:
        """From 0 to the end of the last action."""
        return max(spans[-1].end for spans in self.spans)

    def busy(self) -> tuple[float, ...]:
        """By rank, time spent in actions."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    def bubbles(self) -> tuple[float, ...]:
        """By rank, time of the makespan spent in no action."""
        return tuple(self.makespan - busy for busy in self.busy())


def simulate(
    schedule: Schedule, times: Times | None = None, delay: Callable[[Action, int], float] | None = None
) -> Timeline:
    """Run ``schedule`` on paper.

    Args:
        times: how long things take; 1 for a forward and each part of a backward, by default.
        delay: by how much a rank starts an action later than it could, a function of the action and the rank.

    Raises:
        Deadlock: the schedule never ends; the message names the actions that wait for each other.
    """
    times = times or Times()
    spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
    arrivals: dict[Key, tuple[float, int, float]] = {}
    for rank, index in execution_order(schedule):
        action = schedule.actions[rank][index]
        start = spans[rank][-1].end if spans[rank] else 0.0
        for key in needed(schedule, action):
            end, maker, travel = arrivals[key]
            start = max(start, end if maker == rank else end + travel)
        if delay is not None:
            start += delay(action, rank)
        span = Span(action, start, start + times.of(action, rank))
        spans[rank].append(span)
        for key, work in zip(made(action), action.works, strict=True):
            arrivals[key] = span.end, rank, times.of_message(work, rank)
    return Timeline(schedule, tuple(map(tuple, spans)))
