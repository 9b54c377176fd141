"""Load on a server by the wall clock, open or closed, and what each request got.

Open: requests arrive when they are due, whatever the server does; a time to first token counts from then, also where
the server was in the middle of a step and took the request later.  Closed: each client sends its next request when its
last one is answered.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .statistics import percentiles


@dataclass(frozen=True)
class Job:
    """A request of a load."""

    number: int
    at: float
    """Seconds after the load's beginning; a closed load sets it when the request is sent."""
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Event:
    """New tokens of a request."""

    number: int
    at: float
    """On the server's clock."""
    tokens: int
    """That it has now, in all."""
    finished: bool = False
    cached: int = 0
    """Prompt tokens that a cache held."""


class Server(Protocol):
    """What a load is put on."""

    @property
    def unfinished(self) -> bool:
        """Whether there is anything to do."""
        ...

    def add(self, job: Job) -> None:
        """Queue a request."""
        ...

    def step(self) -> list[Event]:
        """Work for a while."""
        ...


class Load(Protocol):
    """Where requests come from.  Times are seconds after the load's beginning."""

    def due(self, now: float) -> list[Job]:
        """Those that have arrived by now and were not told before."""
        ...

    def next_time(self) -> float | None:
        """When the next arrives, if that is known."""
        ...

    def answered(self, number: int, at: float) -> None:
        """A request is finished."""
        ...


class OpenLoad:
    """Requests at their own times."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = deque(sorted(jobs, key=lambda job: job.at))

    def due(self, now: float) -> list[Job]:
        ready: list[Job] = []
        while self._jobs and self._jobs[0].at <= now:
            ready.append(self._jobs.popleft())
        return ready

    def next_time(self) -> float | None:
        return self._jobs[0].at if self._jobs else None

    def answered(self, number: int, at: float) -> None:
        del number, at


class ClosedLoad:
    """``clients`` that each send their next request as soon as the last is answered."""

    def __init__(self, jobs: Iterable[Job], clients: int) -> None:
        self._jobs = deque(jobs)
        self._ready = [0.0] * clients

    def due(self, now: float) -> list[Job]:
        arrived: list[Job] = []
        while self._jobs and self._ready and min(self._ready) <= now:
            at = min(self._ready)
            self._ready.remove(at)
            arrived.append(replace(self._jobs.popleft(), at=at))
        return arrived

    def next_time(self) -> float | None:
        return min(self._ready) if self._jobs and self._ready else None

    def answered(self, number: int, at: float) -> None:
        del number
        self._ready.append(at)


@dataclass
class Served:
    """What one request got; times are seconds after the load's beginning."""

    arrival: float
    prompt_tokens: int
    first: float = 0.0
    """When its first token was there."""
    last: float = 0.0
    tokens: int = 0
    cached: int = 0

    @property
    def first_token_seconds(self) -> float:
        return self.first - self.arrival

    @property
    def seconds_a_token(self) -> float:
        """After the first."""
        return (self.last - self.first) / (self.tokens - 1)


def serve(
    server: Server,
    load: Load,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Served]:
    """Put the load on the server until all is answered; what each request got, in the order of arrival."""
    begin = clock()
    served: dict[int, Served] = {}
    while True:
        for job in load.due(clock() - begin):
            served[job.number] = Served(job.at, len(job.prompt))
            server.add(job)
        if server.unfinished:
            for event in server.step():
                _note(served[event.number], event, event.at - begin)
                if event.finished:
                    load.answered(event.number, event.at - begin)
        elif (at := load.next_time()) is None:
            return sorted(served.values(), key=lambda each: each.arrival)
        else:
            sleep(max(0.0, at - (clock() - begin)))


def _note(served: Served, event: Event, at: float) -> None:
    if event.tokens and not served.tokens:
        served.first = at
    served.tokens, served.last, served.cached = event.tokens, at, event.cached


def poisson(jobs: Sequence[Job], per_second: float, seed: int = 0) -> list[Job]:
    """The same requests with exponential gaps."""
    draw = random.Random(seed)
    at = 0.0
    arrivals: list[Job] = []
    for job in jobs:
        at += draw.expovariate(per_second)
        arrivals.append(replace(job, at=at))
    return arrivals


def synthetic(count: int, vocab_size: int, prompt: tuple[int, int], new: tuple[int, int], seed: int = 0) -> list[Job]:
    """Requests of random tokens, lengths even between the bounds, all at 0."""
    draw = random.Random(seed)
    return [
        Job(number, 0.0, tuple(draw.randrange(2, vocab_size) for _ in range(draw.randint(*prompt))), draw.randint(*new))
        for number in range(count)
    ]


def summary(served: Sequence[Served]) -> dict[str, object]:
    """Throughput, percentiles, the queue and the cache's share.

    ``waiting_for_first_token`` is the mean number of requests that have arrived and have no token yet, by Little's law;
    it means the same for any server.
    """
    seconds = max(each.last for each in served)
    prompt = sum(each.prompt_tokens for each in served)
    return {
        "requests": len(served),
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "output_tokens_per_second": sum(each.tokens for each in served) / seconds,
        "tokens_per_second": (prompt + sum(each.tokens for each in served)) / seconds,
        "first_token_seconds": percentiles([each.first_token_seconds for each in served]),
        "seconds_a_token": percentiles([each.seconds_a_token for each in served if each.tokens > 1]),
        "waiting_for_first_token": sum(each.first_token_seconds for each in served) / seconds,
        "cached_share": sum(each.cached for each in served) / prompt,
    }
