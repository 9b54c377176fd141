"""Pages behind the engine: the same tokens, to the last bit, from memory, store, another engine or computation."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.cache.disk import DiskCache
from abyssal.cache.key import PageSpace
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import IMPORT_SECONDS, Engine
from abyssal.engine.messages import Request, RequestOutput, SamplingParams
from abyssal.engine.stored import FetchRates, StoredPages
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import random_model
from tests.support.forked import exit_status, fork
from tests.support.page_stores import SPACE, LyingStore, MemoryStore, RaisingStore, SlowStore
from tests.support.stored_engines import DETERMINISTIC, PARAMS, SPEC, ask, prompt_of, result, run, stored_in


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SPEC)


# Hits.


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, DETERMINISTIC),
        (torch.bfloat16, DETERMINISTIC),
        (torch.bfloat16, replace(DETERMINISTIC, num_drafts=2, token_budget=80)),
        (torch.float32, replace(DETERMINISTIC, page_dtype="fp8")),
    ],
    ids=["float32", "bfloat16", "drafts", "fp8 pages"],
)
def test_pages_come_back_from_disk_bit_for_bit(dtype: torch.dtype, config: EngineConfig, tmp_path: Path) -> None:
    model = random_model(SPEC, dtype=dtype)
    prompt, outputs = prompt_of(200), []
    wanted = ask(model, None, config=replace(DETERMINISTIC, page_dtype=config.page_dtype))
    for _ in range(2):
        with DiskCache(tmp_path / "cache", 1 << 24) as store:
            outputs.append(ask(model, store, prompt, config=config))
    assert [output.cached_tokens for output in outputs] == [0, 192]
    assert result(outputs[0]) == result(outputs[1]) == result(wanted)


def test_a_hit_in_store_and_memory_is_counted_once_and_a_known_page_is_not_written_again(model: Transformer) -> None:
    store = MemoryStore()
    ask(model, store)
    assert len(store.pages) == 3
    engine = Engine(model, config=DETERMINISTIC, stored=stored_in(store))
    num_cached = []
    for number, length in enumerate((70, 200, 200, 330)):
        output = run(engine, Request(number, prompt_of(length), PARAMS))[number]
        num_cached.append(output.cached_tokens)
        assert result(output) == result(ask(model, None, prompt_of(length)))
    assert num_cached == [64, 192, 192, 192], "of the store, of memory and the store, of memory, of memory"
    assert store.num_read == 3 and len(store.pages) == len(store.namespaces) == 5


def test_pages_of_generated_text_are_of_the_decode_path(model: Transformer) -> None:
    store = MemoryStore()
    params = SamplingParams(temperature=0, max_tokens=80)
    first = ask(model, store, prompt_of(130), params, EngineConfig())
    turn = (*prompt_of(130), *first.token_ids, 3)
    assert ask(model, store, turn, params, DETERMINISTIC).cached_tokens == 128, "prefill would give other bits"
    second = ask(model, store, turn, params, EngineConfig())
    assert second.cached_tokens == 192
    assert ask(model, store, (*turn, *second.token_ids), params, EngineConfig()).cached_tokens >= 256
    kept = dict(store.pages)
    assert ask(model, store, (*turn, *second.token_ids), params, DETERMINISTIC).cached_tokens == 192, "what it wrote"
    assert kept.items() <= store.pages.items(), "a decode-path page never passed for another"


def test_namespaces_weights_and_layouts_have_pages_of_their_own(model: Transformer) -> None:
    store = MemoryStore()
    for namespace, hit in (("alice", 0), ("bob", 0), ("alice", 192), ("", 0)):
        assert ask(model, store, namespace=namespace).cached_tokens == hit
    assert set(store.namespaces) == {"alice", "bob", ""}
    for config in (replace(DETERMINISTIC, num_drafts=1), replace(DETERMINISTIC, page_dtype="fp8")):
        assert ask(model, store, config=config).cached_tokens == 0
    other = stored_in(store, replace(SPACE, weights="other"))
    assert other.lookup(prompt_of(200), b"", ("prompt",)) == 0


def test_new_weights_are_another_space_that_nobody_shares(model: Transformer) -> None:
    store = MemoryStore()
    for _ in range(2):
        stored = stored_in(store)
        engine = Engine(model, config=DETERMINISTIC, stored=stored)
        stored.change_weights(1)
        assert run(engine, Request(0, prompt_of(200), PARAMS))[0].cached_tokens == 0
    assert len(store.pages) == 6


def test_weights_may_change_and_memory_be_given_up_while_pages_are_read(model: Transformer) -> None:
    store = SlowStore(0.1)
    wanted = ask(model, store)
    kept = dict(store.pages)
    engine = Engine(model, config=DETERMINISTIC, stored=stored_in(store))
    engine.add(Request(0, prompt_of(200), PARAMS))
    engine.step()
    engine.sleep()
    engine.wake()
    engine.step()
    engine.update_weights(1)
    outputs: list[RequestOutput] = []
    while engine.unfinished:
        outputs += engine.step()
        engine.scheduler.check()
    assert (outputs[-1].token_ids, outputs[-1].logprobs) == (wanted.token_ids, wanted.logprobs)
    assert len(store.pages) == 2 * len(kept), "the new weights' pages are written anew"
    assert kept.items() <= store.pages.items()


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_drafts_are_accepted_after_a_hit_as_without(trained_model: Any, num_drafts: int) -> None:
    tokenizer = trained_model.tokenizer
    prompt = tuple(tokenizer.encode("def read(self, size=-1):\n    return self.data\n\n" * 8, add_bos=True))
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    store, seen = MemoryStore(), []
    for _ in range(2):
        engine = Engine(
            trained_model.model,
            tokenizer,
            EngineConfig(deterministic=True, num_drafts=num_drafts),
            stored=stored_in(store),
        )
        output = run(engine, Request(0, prompt, params))[0]
        seen.append((result(output), engine.draft_acceptance))
        assert output.cached_tokens == (len(seen) - 1) * ((len(prompt) - 1) // 64 * 64)
    assert seen[0] == seen[1] and (seen[0][1] or 0) > 0.15


def test_who_asks_about_the_prompt_has_it_computed(model: Transformer) -> None:
    store = MemoryStore()
    ask(model, store)
    output = ask(model, store, params=replace(PARAMS, prompt_logprobs=0))
    assert output.cached_tokens == 0 and output.prompt_logprobs is not None and None not in output.prompt_logprobs[1:]


# Stores that are slow, busy, broken or wrong.


def test_others_run_while_pages_are_read_and_nobody_spins(model: Transformer) -> None:
    store = SlowStore(0.3)
    wanted = ask(model, store)
    engine = Engine(model, config=DETERMINISTIC, stored=stored_in(store))
    engine.add(Request(0, prompt_of(200), PARAMS))
    engine.add(Request(1, prompt_of(20, 1), replace(PARAMS, max_tokens=400, ignore_eos=True)))
    steps = 0
    while not any(output.request_id == 0 for output in engine.step()):
        steps += 1
    assert steps > 2, "the other request has been written on"
    engine.cancel(1)
    while engine.unfinished:
        engine.step()
    engine = Engine(model, config=DETERMINISTIC, stored=stored_in(store))
    engine.add(Request(0, prompt_of(200), PARAMS))
    steps, outputs = 0, []
    while engine.unfinished:
        outputs = engine.step()
        steps += 1
    assert result(outputs[0]) == result(wanted)
    assert steps < 8 + 0.3 / IMPORT_SECONDS + 4


def test_a_request_may_be_cancelled_while_its_pages_are_read(model: Transformer) -> None:
    store = SlowStore(0.1)
    ask(model, store)
    engine = Engine(model, config=DETERMINISTIC, stored=stored_in(store))
    engine.add(Request(0, prompt_of(200), PARAMS))
    engine.step()
    engine.cancel(0)
    outputs: list[RequestOutput] = []
    while engine.unfinished:
        outputs += engine.step()
    assert [output.finish_reason for output in outputs] == ["cancelled"]
    engine.scheduler.check()


@pytest.mark.parametrize("methods", [("lookup",), ("read",), ("write",), ("close",), ()])
def test_a_store_that_raises_fails_no_request(
    model: Transformer, methods: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    store = RaisingStore(*methods)
    store.pages = (full := MemoryStore()).pages
    if methods != ("write",):
        ask(model, full)
    wanted = result(ask(model, None))
    stored = stored_in(store)
    engine = Engine(model, config=DETERMINISTIC, stored=stored)
    for number in range(3 if not methods else 1):
        assert result(run(engine, Request(number, prompt_of(200), PARAMS))[number]) == wanted
        engine.scheduler.drop_pages()
    stored.close()
    warnings = [record for record in caplog.records if "the store of pages fails" in record.message]
    assert len(warnings) == 1 or not methods


def test_a_store_that_lies_gives_no_wrong_token(model: Transformer) -> None:
    wanted = {length: result(ask(model, None, prompt_of(length))) for length in (70, 140, 200)}
    for seed in range(4):
        stored = stored_in(store := LyingStore(seed))
        engine = Engine(model, config=DETERMINISTIC, stored=stored)
        for number, length in enumerate((200, 70, 140, 200)):
            before = store.num_read
            output = run(engine, Request(number, prompt_of(length), PARAMS))[number]
            assert result(output) == wanted[length]
            assert output.cached_tokens <= (store.num_read - before) * 64, "only what came is counted"
            engine.scheduler.drop_pages()


def test_what_comes_is_used_and_the_rest_computed(model: Transformer) -> None:
    full, store = MemoryStore(), MemoryStore()
    ask(model, full)
    store.lookup = lambda keys: len(keys)  # type: ignore[method-assign]
    store.pages = dict([*full.pages.items()][:1])
    output = ask(model, store)
    assert output.cached_tokens == 64 and result(output) == result(ask(model, None))
    assert store.pages.keys() == full.pages.keys(), "what was missing is written again"


def test_a_store_that_is_slower_than_the_model_is_left_alone_and_tried_again() -> None:
    rates = FetchRates()
    rates.note_computed(1000, 1.0)
    for _ in range(20):
        assert rates.pay() or rates._num_reads >= 16
        rates.note_read(64, 1.0)
    assert sum(rates.pay() for _ in range(64)) == 4, "now and then"
    for _ in range(100):
        rates.note_read(64, 1e-3)
    assert all(rates.pay() for _ in range(64)), "it has become fast"


# Opening.


def test_a_store_opens_in_the_background_and_is_used_from_then_on(model: Transformer) -> None:
    store, may_open, may_know = MemoryStore(), threading.Event(), threading.Event()
    ask(model, store)

    def opening() -> MemoryStore:
        assert may_open.wait(10)
        return store

    def finding(stopped: Any) -> PageSpace:
        assert may_know.wait(10)
        return SPACE

    stored = StoredPages(opening, finding)
    engine = Engine(model, config=replace(DETERMINISTIC, prefix_cache=False), stored=stored)
    for number, (event, hit) in enumerate(((None, 0), (may_open, 0), (may_know, 192))):
        if event is not None:
            event.set()
        assert stored.wait(10 if hit else 0.05) == bool(hit)
        assert run(engine, Request(number, prompt_of(200), PARAMS))[number].cached_tokens == hit
    stored.close()
    assert store.closed and not stored.wait(0)
    assert run(engine, Request(3, prompt_of(200), PARAMS))[3].cached_tokens == 0, "closed, it is empty"


def test_closing_gives_up_what_takes_long() -> None:
    def finding(stopped: Any) -> PageSpace:
        deadline = time.monotonic() + 20
        while not stopped():
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        raise ValueError("given up")

    stored = StoredPages(MemoryStore, finding)
    begun = time.monotonic()
    stored.close()
    assert time.monotonic() - begun < 5


def test_a_store_that_cannot_be_opened_is_no_store(model: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    def opening() -> MemoryStore:
        raise ValueError("no such place")

    stored = StoredPages(opening, SPACE)
    assert not stored.wait(10)
    engine = Engine(model, config=DETERMINISTIC, stored=stored)
    assert run(engine, Request(0, prompt_of(70), PARAMS))[0].error is None
    assert [record.message for record in caplog.records] == ["pages are not kept beyond this process: no such place"]


def test_a_fork_opens_its_own(model: Transformer, tmp_path: Path) -> None:
    with DiskCache(tmp_path / "cache", 1 << 24) as store:
        ask(model, store)
    stored = StoredPages(lambda: DiskCache(tmp_path / "cache", 1 << 24), SPACE)
    assert stored.wait(10)
    engine = Engine(model, config=replace(DETERMINISTIC, prefix_cache=False), stored=stored)
    first = run(engine, Request(0, prompt_of(200), PARAMS))[0]

    def child() -> None:
        output = run(engine, Request(1, prompt_of(200), PARAMS))[1]
        assert output.cached_tokens == first.cached_tokens == 192 and result(output) == result(first)
        run(engine, Request(2, prompt_of(200, 1), PARAMS))
        engine.close()
        stored.close()

    assert exit_status(fork(child)) == 0
    assert run(engine, Request(3, prompt_of(200, 1), PARAMS))[3].cached_tokens == 192, "of the child"
    stored.close()
