"""A trace of an engine's steps on demand, in Chrome's JSON format, which https://ui.perfetto.dev opens.

Each step is a slice with its phases inside: ``plan`` (taking in pages that arrived, and the scheduler), ``launch``
(the model's pass), ``collect`` (sampling and drafting), ``update`` (the scheduler takes results in, finished pages go
to disk, news are put together) and ``send``.  What it computed stands in the step's arguments; counters run along.
Between steps the process reads commands, or waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from abyssal.engine.messages import StepPlan
from abyssal.engine.wire import Statistics

PROCESS, THREAD = 1, 1
MICROSECONDS = 1e6


@dataclass(frozen=True)
class _Phase:
    name: str
    begin: float
    end: float


class StepRecorder:
    """Records so many steps, or those of so many seconds.

    Args:
        clock: seconds.
    """

    def __init__(self, steps: int, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._left = steps
        self._clock = clock
        self._began = clock()
        self._until = self._began + seconds
        self._number = 0
        self._phases: list[_Phase] = []
        self._plan: StepPlan | None = None
        self._last = self._began
        self._events: list[dict[str, Any]] = [
            _name("process_name", "abyssal engine"),
            _name("thread_name", "steps"),
        ]

    @property
    def done(self) -> bool:
        """Whether there are as many steps, or the time is over."""
        return self._left <= 0 or self._clock() >= self._until

    def begin(self) -> None:
        """A step begins."""
        self._phases, self._plan, self._last = [], None, self._clock()

    def phase(self, name: str, plan: StepPlan | None = None) -> None:
        """What the step did since the last call was this."""
        now = self._clock()
        self._phases.append(_Phase(name, self._last, now))
        self._last, self._plan = now, plan or self._plan

    def end(self, statistics: Statistics) -> None:
        """The step has ended, and this is how the engine stands."""
        if not self._phases:
            return
        self._left -= 1
        arguments = {"number": self._number, **({} if self._plan is None else _arguments(self._plan))}
        whole = _Phase("step", self._phases[0].begin, self._phases[-1].end)
        self._number += 1
        self._events.append(self._slice(whole, arguments))
        self._events += [self._slice(phase) for phase in self._phases]
        tokens = {name: arguments.get(name, 0) for name in ("prompt_tokens", "decode_tokens")}
        self._count(whole.begin, "tokens", tokens)
        self._count(whole.end, "sequences", {"running": statistics.running, "waiting": statistics.waiting})
        self._count(whole.end, "used pages", {"pages": statistics.used_pages})

    def trace(self) -> bytes:
        """All of it, as a file."""
        return msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"})

    def _slice(self, phase: _Phase, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        begin, length = self._time(phase.begin), (phase.end - phase.begin) * MICROSECONDS
        event = {"name": phase.name, "ph": "X", "ts": begin, "dur": round(length, 3), "pid": PROCESS, "tid": THREAD}
        return {**event, "args": arguments} if arguments else event

    def _count(self, at: float, name: str, values: dict[str, int]) -> None:
        self._events.append({"name": name, "ph": "C", "ts": self._time(at), "pid": PROCESS, "args": values})

    def _time(self, at: float) -> float:
        return round((at - self._began) * MICROSECONDS, 3)


def _arguments(plan: StepPlan) -> dict[str, Any]:
    """What a step computed."""
    prompt = sum(chunk.num_tokens for chunk in plan.chunks if chunk.path == "prompt")
    return {
        "chunks": len(plan.chunks),
        "prompt_tokens": prompt,
        "decode_tokens": plan.num_tokens - prompt,
        "drafts": sum(chunk.num_drafts for chunk in plan.chunks),
        "copied_pages": len(plan.copies),
        "exports": len(plan.exports),
        "imports": len(plan.imports),
    }


def _name(kind: str, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": PROCESS, "tid": THREAD, "args": {"name": name}}
