"""A rank of ``benchmarks/overlap.py``: one step after another, each in the way that it is asked for.

Weights stay as they are, so that every step has the same losses and gradients, bit for bit, in every way; an answer has
both, the seconds of the step, and the processor time of the main thread and of all others.  The process keeps to one
core, and with it the threads that communicate.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from support.limiter import hold_back
from support.rank import serve
from torch import distributed

from abyssal.model.dispatch import Dispatcher
from abyssal.parallel.dispatch.alltoall import AllToAllDispatcher
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.pipeline.executor import Executor, Pair
from abyssal.parallel.pipeline.hidden import MeasuredDispatcher, Stopwatch
from abyssal.parallel.pipeline.interleaving import SERIAL as EACH_WAITED_FOR
from abyssal.parallel.pipeline.interleaving import V3
from abyssal.parallel.pipeline.pair import OverlappedPair
from abyssal.parallel.pipeline.schedule import schedule
from abyssal.train.config import ParallelConfig
from abyssal.train.loop import build_model
from abyssal.train.ranks import expert_share

from .notes import NotedChunk, NotedDispatcher, NotedInterleaving, NotedPair, Notes
from .replay import Keeping, Kept, Replaying
from .setting import RANKS, Setting

KEEP, SERIAL, OVERLAPPED, NONE = "keep", "serial", "overlapped", "none"
WAYS = (SERIAL, OVERLAPPED, NONE)


class Rank:
    """A model with this rank's experts, and an executor for each way."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        hold_back(list(range(RANKS)))
        self._mesh = Mesh(setting.mesh, timeout=timedelta(seconds=300))
        rank = self._mesh.rank
        share = expert_share(setting.spec, ParallelConfig(mesh=str(setting.mesh)), setting.mesh, rank)
        self._model = build_model(setting.spec, setting.config, share)
        self._dispatcher = AllToAllDispatcher(self._model.placements(), self._mesh)
        self._batches = setting.batches(rank)
        self._kept = Kept()
        self._notes = Notes()
        self._stopwatch = Stopwatch()
        plan = schedule("dualpipev", 1, setting.micro_batches)
        half = setting.layers // 2
        self._chunks = [NotedChunk(self._model, range(place * half, (place + 1) * half), place, 2) for place in (0, 1)]
        for chunk in self._chunks:
            chunk.notes = self._notes
        pairs: dict[str, Pair] = dict.fromkeys((KEEP, SERIAL, NONE), OverlappedPair(EACH_WAITED_FOR))
        pairs[OVERLAPPED] = OverlappedPair(NotedInterleaving(V3, self._notes))
        self._executors = {
            way: Executor(plan, 0, self._chunks, None, NotedPair(pair, self._notes), self._stopwatch)
            for way, pair in pairs.items()
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """A step in ``way``; with ``notes``, what was done when."""
        way = request["way"]
        numbered = enumerate(self._batches)
        given = [
            self._setting.micro_batch(self._model, self._mesh.rank, number, part, self._dispatcher_of(way, number))
            for number, part in numbered
        ]
        for chunk in self._chunks:
            chunk.begin(given)
        self._notes.clear()
        distributed.barrier(self._mesh.control)
        before = time.process_time(), time.thread_time(), _interrupted()
        times = self._executors[way].run(self._setting.boundary)
        after = time.process_time(), time.thread_time(), _interrupted()
        everyone, main, interrupted = (end - start for start, end in zip(before, after, strict=True))
        answer = {
            **asdict(times),
            "pairs": sum(ended - began for what, began, ended in self._notes.works if what.startswith("pair")),
            "main_thread": main,
            "other_threads": everyone - main,
            "interrupts": interrupted,
            "loss": math.fsum(float(one) for losses in self._chunks[-1].losses.values() for one in losses).hex(),
            "gradients": self._take_gradients(),
            "waits": _waits(self._notes),
        }
        return {**answer, "notes": asdict(self._notes)} if request.get("notes") else answer

    def _dispatcher_of(self, way: str, micro_batch: int) -> Dispatcher:
        if way == NONE:
            return Replaying(self._kept, micro_batch)
        measured = MeasuredDispatcher(NotedDispatcher(self._dispatcher, self._notes), self._stopwatch)
        return Keeping(measured, self._kept, micro_batch) if way == KEEP else measured

    def _take_gradients(self) -> str:
        """Their fingerprint; they begin anew."""
        found = hashlib.sha256()
        for name, parameter in sorted(self._model.named_parameters()):
            if parameter.grad is not None:
                found.update(name.encode())
                found.update(parameter.grad.numpy().tobytes())
                parameter.grad.zero_()
        return found.hexdigest()


def _waits(notes: Notes) -> dict[str, float]:
    """Seconds by move that waits."""
    found: dict[str, float] = {}
    for what, began, ended in notes.moves:
        if " wait " in what:
            found[what] = found.get(what, 0.0) + ended - began
    return found


def _interrupted() -> float:
    """Seconds that this process's core has spent on interrupts' work, of the network above all; no process has them."""
    (core,) = os.sched_getaffinity(0)
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    return next(int(line[7]) for line in lines if line[0] == f"cpu{core}") / os.sysconf("SC_CLK_TCK")


def start(request: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return Rank(Setting(**request["setting"])).answer


if __name__ == "__main__":
    cores = json.loads(sys.argv[1])["cores"]  # before the first thread of gloo, which keeps to what it finds
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"])]})
    serve(start)
