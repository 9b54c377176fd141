"""Engines that are killed while they write pages to a folder that others use."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from abyssal.cache.disk import DiskCache
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, RequestOutput, SamplingParams
from abyssal.engine.stored import StoredPages
from abyssal.model.transformer import Transformer
from tests.support.forked import exit_status, fork
from tests.support.page_stores import SPACE

CONFIG = EngineConfig(deterministic=True, prefix_cache=False)
PARAMS = SamplingParams(temperature=0.9, seed=5, max_tokens=3, logprobs=0)
LENGTHS = (70, 140, 200)


class Asker:
    """Questions by number, and their right answers.

    Args:
        folder: of the disk cache.
        num_prompts: whose answers are computed beforehand, without a cache.
    """

    def __init__(self, model: Transformer, folder: Path, num_prompts: int) -> None:
        self._model = model
        self._folder = folder
        generator = torch.Generator().manual_seed(3)
        self.prompts = [
            tuple(torch.randint(0, 40, (LENGTHS[number % 3],), generator=generator).tolist())
            for number in range(num_prompts)
        ]
        plain = Engine(model, config=CONFIG)
        self._right = [_answer(self._run(plain, number)) for number in range(num_prompts)]

    def _run(self, engine: Engine, number: int) -> RequestOutput:
        engine.add(Request(number, self.prompts[number], PARAMS))
        while True:
            for output in engine.step():
                if output.finished:
                    return output

    def ask(self, numbers: Sequence[int], after: Callable[[int], object] = lambda cached_tokens: None) -> list[int]:
        """Ask a new engine; every answer must be right.  The tokens of each that came from the cache."""
        stored = StoredPages(lambda: DiskCache(self._folder, 1 << 24, segment_bytes=1 << 16), SPACE)
        assert stored.wait(30)
        engine, found = Engine(self._model, config=CONFIG, stored=stored), []
        for number in numbers:
            output = self._run(engine, number)
            assert _answer(output) == self._right[number], f"request {number} went wrong"
            found.append(output.cached_tokens)
            after(output.cached_tokens)
        engine.close()
        stored.close()
        return found

    def killed(self, numbers: Sequence[int], generator: random.Random) -> int:
        """Ask in a child that is killed at a random moment on the way; the process id of the child, which has ended.

        Raises:
            AssertionError: it ended by itself with a wrong answer.
        """
        reader, writer = os.pipe()
        child = fork(lambda: self.ask(numbers, lambda cached: os.write(writer, b".")))
        os.close(writer)
        for _ in range(generator.randrange(len(numbers))):
            if not os.read(reader, 1):
                break
        time.sleep(generator.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        status = exit_status(child)
        assert status in (-signal.SIGKILL, 0), f"an answer was wrong, or the engine failed: {status}"
        return child

    @property
    def whole(self) -> list[int]:
        """Tokens that each prompt can have from the cache."""
        return [(len(prompt) - 1) // 64 * 64 for prompt in self.prompts]


def _answer(output: RequestOutput) -> tuple[object, ...]:
    return output.token_ids, output.logprobs, output.error, output.finish_reason
