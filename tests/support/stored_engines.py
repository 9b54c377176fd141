"""Engines over stores of pages, and what their answers are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from abyssal.cache.key import PageSpace
from abyssal.cache.store import PageStore
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, RequestOutput, SamplingParams
from abyssal.engine.stored import StoredPages
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL
from tests.support.page_stores import SPACE

SPEC = replace(SMALL, max_positions=512)
DETERMINISTIC = EngineConfig(deterministic=True)
PARAMS = SamplingParams(temperature=0.9, seed=5, max_tokens=8, logprobs=1)


def prompt_of(length: int, text: int = 0) -> tuple[int, ...]:
    """The first tokens of a text, so that prompts of one text share their beginnings."""
    return tuple(torch.randint(0, 40, (512,), generator=torch.Generator().manual_seed(text))[:length].tolist())


def stored_in(store: PageStore, space: PageSpace = SPACE) -> StoredPages:
    return StoredPages(store, space)


def run(engine: Engine, *requests: Request) -> dict[int, RequestOutput]:
    """Outputs by request, the pages' accounts checked at each step."""
    done: dict[int, RequestOutput] = {}
    for request in requests:
        engine.add(request)
    while len(done) < len(requests):
        done.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.scheduler.check()
    return done


def result(output: RequestOutput) -> tuple[Any, ...]:
    return output.token_ids, output.logprobs, output.finish_reason, output.error


def ask(
    model: Transformer,
    store: PageStore | None,
    prompt: Sequence[int] = prompt_of(200),
    params: SamplingParams = PARAMS,
    config: EngineConfig = DETERMINISTIC,
    namespace: str = "",
) -> RequestOutput:
    """One request to a new engine."""
    engine = Engine(model, config=config, stored=None if store is None else stored_in(store))
    output = run(engine, Request(0, tuple(prompt), params, namespace=namespace))[0]
    engine.close()
    completion = output.outputs[0]
    assert 0 <= completion.cached_tokens < completion.prompt_tokens == len(prompt)
    return output
