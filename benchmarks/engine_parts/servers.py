"""The engine, and transformers with static batching, as servers of a load."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, SamplingParams

from .load import Event, Job
from .peers import generate_times, left_padded


class EngineServer:
    """The engine, a step at a time.  Output is greedy and as long as the job says."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps = 0

    @property
    def unfinished(self) -> bool:
        return self.engine.unfinished

    def add(self, job: Job) -> None:
        params = SamplingParams(temperature=0, max_tokens=job.new_tokens, ignore_eos=True)
        self.engine.add(Request(job.number, job.prompt, params))

    def step(self) -> list[Event]:
        changed = self.engine.step()
        self.steps += 1
        at = time.perf_counter()
        for output in changed:
            assert output.error is None, output.error
        return [
            Event(output.request_id, at, len(output.token_ids), output.finished, output.cached_tokens)
            for output in changed
        ]


class StaticServer:
    """transformers' ``generate``: whoever waits, up to ``batch``, padded together until the longest has ended.

    A request counts as finished at its own last token, though the batch goes on.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self._model = model
        self._batch = batch
        self._waiting: deque[Job] = deque()

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def step(self) -> list[Event]:
        jobs = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        tokens_BS, mask_BS = left_padded([job.prompt for job in jobs])
        times = generate_times(self._model, tokens_BS, max(job.new_tokens for job in jobs), mask_BS)
        firsts = [Event(job.number, times[0], 1, job.new_tokens == 1) for job in jobs]
        lasts = [Event(j.number, times[j.new_tokens - 1], j.new_tokens, True) for j in jobs if j.new_tokens > 1]
        return firsts + lasts
