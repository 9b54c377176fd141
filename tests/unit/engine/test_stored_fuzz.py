"""Preemption by offload, and whatever else may happen to pages: no token changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.cache.disk import DiskCache
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, RequestOutput, SamplingParams
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import random_model
from tests.support.page_stores import LyingStore, MemoryStore, RaisingStore, SlowStore
from tests.support.stored_engines import DETERMINISTIC, PARAMS, SPEC, ask, prompt_of, result, run, stored_in


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SPEC)


# Preemption.

CROWD = [Request(n, prompt_of(62 - n, n), replace(PARAMS, seed=n, max_tokens=76)) for n in range(4)]
"""All begin with a page, and all come to need three."""


def crowded(num_drafts: int = 0) -> EngineConfig:
    return replace(
        DETERMINISTIC,
        cache_tokens=5 * 64,
        token_budget=40,
        max_sequences=6,
        preemption="offload",
        num_drafts=num_drafts,
        prefix_cache=False,
    )


@pytest.fixture(scope="module")
def undisturbed(model: Transformer) -> dict[int, tuple[Any, ...]]:
    engine = Engine(model, config=DETERMINISTIC)
    return {request.request_id: result(run(engine, request)[request.request_id]) for request in CROWD}


@pytest.mark.parametrize(
    ("store", "num_drafts"),
    [(MemoryStore(), 0), (MemoryStore(), 2), (LyingStore(), 1), (RaisingStore("write"), 0)],
    ids=["plain", "drafts", "pages are lost", "nothing is taken"],
)
def test_preempted_requests_go_on_where_they_were(
    model: Transformer, undisturbed: dict[int, tuple[Any, ...]], store: MemoryStore, num_drafts: int
) -> None:
    engine = Engine(model, config=crowded(num_drafts), stored=stored_in(store))
    computed = 0
    plan = engine.scheduler.plan

    def counting(*arguments: Any) -> Any:
        nonlocal computed
        made = plan(*arguments)
        computed += sum(len(chunk.tokens) for chunk in made.chunks)
        return made

    engine.scheduler.plan = counting  # type: ignore[method-assign]
    outputs = run(engine, *CROWD)
    assert {number: result(output) for number, output in outputs.items()} == undisturbed
    assert engine.scheduler.num_preemptions > 0
    needed = sum(len(r.prompt_ids) + len(outputs[r.request_id].token_ids) - 1 for r in CROWD)
    if type(store) is MemoryStore and not num_drafts:
        assert computed == needed, "nothing is computed twice"


def test_offloading_without_a_store_is_computing_again(
    model: Transformer, undisturbed: dict[int, tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(model, config=crowded())
    assert {number: result(output) for number, output in run(engine, *CROWD).items()} == undisturbed
    assert engine.scheduler.num_preemptions > 0 and "nothing can be offloaded" in caplog.text


# All together.

ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps after the one before
        st.sampled_from([3, 64, 65, 130, 200]),  # tokens of the prompt
        st.integers(0, 1),  # which text
        st.integers(1, 70),  # tokens of the output
        st.sampled_from([None, None, None, 2, 9]),  # cancelled after so many steps
    ),
    min_size=2,
    max_size=6,
)
DISTURBANCES = given(
    arrivals=ARRIVALS,
    num_pages=st.integers(5, 9),
    num_drafts=st.integers(0, 2),
    preemption=st.sampled_from(["recompute", "offload"]),
    prefix=st.booleans(),
    kind=st.sampled_from(["memory", "disk", "lying", "raising", "slow"]),
    seed=st.integers(0, 1 << 20),
)


@pytest.fixture(scope="module")
def alone(model: Transformer) -> dict[Any, tuple[Any, ...]]:
    """What requests give by themselves, filled in as it is asked for."""
    return {}


def _disturbed(
    model: Transformer,
    folder: Path,
    alone: dict[Any, tuple[Any, ...]],
    arrivals: list[tuple[int, int, int, int, int | None]],
    num_pages: int,
    num_drafts: int,
    preemption: Any,
    prefix: bool,
    kind: str,
    seed: int,
) -> None:
    stores: dict[str, Any] = {
        "memory": MemoryStore,
        "disk": lambda: DiskCache(folder, 1 << 16, segment_bytes=1 << 13),
        "lying": lambda: LyingStore(seed),
        "raising": lambda: RaisingStore(seed=seed),
        "slow": lambda: SlowStore(2e-3),
    }
    stored = stored_in(stores[kind]())
    config = EngineConfig(
        deterministic=True,
        cache_tokens=num_pages * 64,
        token_budget=32,
        max_sequences=4,
        num_drafts=num_drafts,
        preemption=preemption,
        prefix_cache=prefix,
    )
    engine = Engine(model, config=config, stored=stored)
    todo: list[tuple[int, int, Request | None]] = []
    step = 0
    for number, (gap, length, text, max_tokens, cancelled) in enumerate(arrivals):
        step += gap
        params = SamplingParams(temperature=0.8, seed=7 * text + length, max_tokens=max_tokens, logprobs=0)
        todo.append((step, number, Request(number, prompt_of(length, text), params)))
        if cancelled is not None:
            todo.append((step + cancelled, number, None))
    requests = {number: request for _, number, request in todo if request is not None}
    todo.sort(key=lambda each: each[0])
    done: dict[int, RequestOutput] = {}
    step = 0
    while todo or engine.unfinished:
        while todo and todo[0][0] <= step:
            _, number, request = todo.pop(0)
            if request is None:
                engine.cancel(number)
            else:
                engine.add(request)
        done.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.scheduler.check()
        step += 1
        assert step < 5000
    stored.close()
    assert done.keys() == requests.keys()
    for number, output in done.items():
        request = requests[number]
        key = request.prompt_ids, request.params.seed
        if key not in alone:
            params = replace(request.params, max_tokens=70)
            alone[key] = result(ask(model, None, request.prompt_ids, params))
        tokens, logprobs, _, _ = result(output)
        assert tokens == alone[key][0][: len(tokens)] and logprobs == alone[key][1][: len(tokens)]
        assert output.error is None and output.finish_reason in ("length", "cancelled")
        assert output.finish_reason == "cancelled" or len(tokens) == request.params.max_tokens
        assert output.cached_tokens < len(request.prompt_ids)


@settings(max_examples=5, deadline=None, database=None, derandomize=True)
@DISTURBANCES
def test_whatever_happens_to_pages_no_token_changes(
    model: Transformer, tmp_path_factory: pytest.TempPathFactory, alone: dict[Any, tuple[Any, ...]], **drawn: Any
) -> None:
    _disturbed(model, tmp_path_factory.mktemp("fuzz") / "cache", alone, **drawn)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@DISTURBANCES
def test_whatever_happens_to_pages_no_token_changes_at_length(
    model: Transformer, tmp_path_factory: pytest.TempPathFactory, alone: dict[Any, tuple[Any, ...]], **drawn: Any
) -> None:
    _disturbed(model, tmp_path_factory.mktemp("fuzz") / "cache", alone, **drawn)
