"""Prefill on one engine and decode on another is one engine, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, RequestOutput, SamplingParams, StructuredOutput
from abyssal.engine.stored import StoredPages
from abyssal.engine.transfer import DraftState, LayerPages, TensorBytes
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL, random_model
from tests.support.page_stores import SPACE, MemoryStore

SPEC = replace(SMALL, max_positions=512)
CONFIG = EngineConfig(deterministic=True)
PROMPT = tuple(torch.randint(0, 40, (150,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SPEC)


def run(engine: Engine) -> RequestOutput:
    outputs: list[RequestOutput] = []
    while engine.unfinished:
        outputs += engine.step()
        engine.scheduler.check()
    return outputs[-1]


def prefill(engine: Engine, params: SamplingParams, **options: Any) -> RequestOutput:
    engine.add(Request(7, PROMPT, params, prefill_only=True, **options))
    output = run(engine)
    assert output.finish_reason == "prefilled" and len(output.token_ids) == 1
    return output


def disaggregated(
    model: Transformer, config: EngineConfig, params: SamplingParams, tokenizer: Any = None, prompt: Any = PROMPT
) -> tuple[RequestOutput, Engine, Engine]:
    first, second = (Engine(model, tokenizer, config) for _ in range(2))
    first.add(Request(7, prompt, params, prefill_only=True))
    prefill_output = run(first)
    exported = first.export_pages(7)
    second.import_pages(exported.prefilled, exported.layers(), request_id=0)
    assert second._runner.draft_state(0) == exported.prefilled.draft, "hidden states cross too"
    output = run(second)
    first.release_pages(7)
    first.scheduler.check()
    assert not first.scheduler.sequences and output.token_ids[:1] == prefill_output.token_ids
    second.close()
    return output, first, second


def whole(
    model: Transformer, config: EngineConfig, params: SamplingParams, tokenizer: Any = None, prompt: Any = PROMPT
) -> tuple[RequestOutput, Engine]:
    engine = Engine(model, tokenizer, config)
    engine.add(Request(0, prompt, params))
    return run(engine), engine


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, page_dtype="fp8")], ids=["plain", "fp8 pages"])
def test_two_engines_are_one(model: Transformer, config: EngineConfig) -> None:
    params = SamplingParams(
        temperature=0.9,
        seed=3,
        max_tokens=20,
        logprobs=2,
        prompt_logprobs=1,
        return_experts=True,
        frequency_penalty=0.5,
    )
    output, _, _ = disaggregated(model, config, params)
    wanted, _ = whole(model, config, params)
    assert (output.outputs[0].experts == wanted.outputs[0].experts).all()
    plain = [replace(each, outputs=(replace(each.outputs[0], experts=None),)) for each in (output, wanted)]
    assert plain[0] == plain[1]


def test_drafting_goes_on_where_it_stood(trained_model: Any) -> None:
    tokenizer = trained_model.tokenizer
    prompt = tuple(tokenizer.encode("def read(self, size=-1):\n    return self.data\n\n" * 8, add_bos=True))
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    for num_drafts in (1, 2):
        config = replace(CONFIG, num_drafts=num_drafts)
        output, first, second = disaggregated(trained_model.model, config, params, tokenizer, prompt)
        wanted, engine = whole(trained_model.model, config, params, tokenizer, prompt)
        assert output == wanted and (engine.draft_acceptance or 0) > 0.15
        assert first.draft_acceptance is None and second.draft_acceptance == engine.draft_acceptance


def test_a_form_and_random_numbers_go_along(trained_model: Any) -> None:
    tokenizer = trained_model.tokenizer
    form = StructuredOutput("regex", "[a-f]{3}-[0-9]{4}")
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20, structured=form)
    prompt = tuple(tokenizer.encode("import ", add_bos=True))
    output, _, _ = disaggregated(trained_model.model, CONFIG, params, tokenizer, prompt)
    wanted, _ = whole(trained_model.model, CONFIG, params, tokenizer, prompt)
    assert output == wanted and "-" in output.text


def test_a_request_without_a_seed_keeps_the_one_it_was_given(model: Transformer) -> None:
    first = Engine(model, config=CONFIG)
    prefill(first, SamplingParams(temperature=1.0, max_tokens=12))
    exported = first.export_pages(7)
    texts = []
    for _ in range(2):
        second = Engine(model, config=CONFIG)
        second.import_pages(exported.prefilled, exported.layers())
        texts.append(run(second).token_ids)
    assert texts[0] == texts[1]


def test_pages_cross_layer_by_layer(model: Transformer) -> None:
    """A layer is read when it is asked for, and written when it has come."""
    first, second = Engine(model, config=CONFIG), Engine(model, config=CONFIG)
    params = SamplingParams(temperature=0, max_tokens=6)
    prefill(first, params)
    exported = first.export_pages(7)
    crossed = []

    def on_the_way() -> Iterator[LayerPages]:
        for layer in exported.layers():
            crossed.append(layer.layer)
            assert layer.entries.shape == (3, 64, 24)
            yield layer

    second.import_pages(exported.prefilled, on_the_way())
    assert not crossed
    assert run(second).token_ids == whole(model, CONFIG, params)[0].token_ids
    assert crossed == [0, 1, 2], "the MTP module's is the last"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("source", ["memory", "store"])
def test_pages_after_a_hit_are_those_of_a_computation(depth: int, source: str) -> None:
    """In every layer, the MTP modules' included, though the text went on otherwise where the pages were made."""
    model = random_model(replace(SPEC, mtp_depth=depth))
    config = replace(CONFIG, num_drafts=depth)
    params = SamplingParams(temperature=0, max_tokens=4)
    store = MemoryStore()
    seen: list[list[Any]] = []
    for warm in (True, False):
        first = Engine(model, None, config, stored=StoredPages(store, SPACE) if warm else None)
        if warm:
            first.add(Request(0, (*PROMPT[:128], *PROMPT[:70]), params))
            run(first)
            if source == "store":
                first = Engine(model, None, config, stored=StoredPages(store, SPACE))
        output = prefill(first, params)
        assert output.cached_tokens == (128 if warm else 0)
        layers = [each.entries.tensor() for each in first.export_pages(7).layers()]
        seen.append([entries.flatten(0, 1)[: 150 - depth] for entries in layers])
    assert len(seen[0]) == 2 + depth
    for hit, computed in zip(*seen, strict=True):
        assert torch.equal(hit, computed)


@pytest.mark.parametrize("damage", ["broken off", "missing", "twice", "shape"])
def test_what_does_not_arrive_is_computed(model: Transformer, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, num_drafts=1)
    first, second = Engine(model, config=config), Engine(model, config=config)
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=6, logprobs=0)
    prefill(first, params)
    exported = first.export_pages(7)
    layers = list(exported.layers())
    wrong = {
        "missing": layers[:2],
        "twice": [*layers, layers[0]],
        "shape": [replace(layers[0], entries=TensorBytes.of(torch.zeros(2, 64, 24))), *layers],
    }

    def breaking() -> Iterator[LayerPages]:
        yield layers[0]
        raise ConnectionError("the line is dead")

    second.import_pages(exported.prefilled, breaking() if damage == "broken off" else wrong[damage], request_id=0)
    output = run(second)
    assert output == whole(model, CONFIG, params)[0]
    assert "did not arrive" in caplog.text


def test_records_are_plain(model: Transformer) -> None:
    """Numbers, texts, bytes, tuples and dictionaries, down to the leaves."""
    first = Engine(model, config=replace(CONFIG, num_drafts=1))
    prefill(first, SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1, return_experts=True), deadline=1e12)
    exported = first.export_pages(7)
    assert isinstance(exported.prefilled.draft, DraftState) and exported.prefilled.seconds_left

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list | tuple):
            for each in value:
                yield from leaves(each)
        else:
            yield value

    found = {type(leaf) for leaf in leaves([asdict(exported.prefilled), *map(asdict, exported.layers())])}
    assert found <= {int, float, str, bytes, bool, type(None)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_tensors_survive_as_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).mul(50).to(dtype)
    assert torch.equal(TensorBytes.of(tensor.T).tensor(), tensor.T) and TensorBytes.of(tensor).tensor().dtype == dtype
    assert TensorBytes.of(tensor[:0]).tensor().shape == (0, 4)
    for wrong in (TensorBytes("float32", (3,), b"12345"), TensorBytes("load", (1,), b"1234")):
        with pytest.raises(ValueError, match=r"float32 tensor|none of torch"):
            wrong.tensor()


def test_what_cannot_be_handed_over_is_refused(model: Transformer) -> None:
    first, other = Engine(model, config=CONFIG), Engine(model, config=replace(CONFIG, page_dtype="fp8"))
    params = SamplingParams(max_tokens=4)
    with pytest.raises(ValueError, match="request_id: 7 holds no pages"):
        first.export_pages(7)
    prefill(first, params)
    exported = first.export_pages(7)
    with pytest.raises(ValueError, match=r"layout: pages are .* there and .* here"):
        other.import_pages(exported.prefilled, exported.layers())
    changed = Engine(random_model(SPEC), config=CONFIG)
    with torch.no_grad():
        changed._model.embed.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"weights: pages were computed with \w+, and this engine has \w+"):
        changed.import_pages(exported.prefilled, exported.layers())
    first.release_pages(7)
    with pytest.raises(ValueError, match="request_id: 7 holds no pages"):
        first.release_pages(7)
    prefill(first, params)
    first.release_pages(7)
    first.scheduler.check()


def test_pages_that_are_gone_are_not_read(model: Transformer) -> None:
    """Others may have written to them since."""
    engine = Engine(model, config=CONFIG)
    for let_go in (lambda: engine.release_pages(7), lambda: engine.update_weights(1), lambda: engine.sleep()):
        prefill(engine, SamplingParams(max_tokens=4))
        layers = engine.export_pages(7).layers()
        assert next(layers).layer == 0
        let_go()
        with pytest.raises(ValueError, match="those of request 7 are gone, with layer 1 and later ones unread"):
            next(layers)


class HungSource:
    """Layers of which the second never comes, until it is let go."""

    def __init__(self, layers: list[LayerPages]) -> None:
        self.layers = layers
        self.begun, self.let_go, self.over = threading.Event(), threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[LayerPages]:
        yield self.layers[0]
        self.begun.set()
        self.let_go.wait(30)
        try:
            yield from self.layers[1:]
        finally:
            self.over.set()


@pytest.mark.parametrize("end", ["cancelled", "deadline", "stalled", "weights", "closed"])
def test_a_source_that_hangs_holds_nothing_up(
    model: Transformer, end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither other imports, nor the end of its request, nor who wants the memory; what comes late is not written."""
    now = 0.0
    first, second = Engine(model, config=CONFIG), Engine(model, config=CONFIG, clock=lambda: now)
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=6)
    prefill(first, params)
    exported = first.export_pages(7)
    sources = [HungSource(list(exported.layers())) for _ in range(3)]
    prefilled = replace(exported.prefilled, seconds_left=5.0 if end == "deadline" else None)
    for number, source in enumerate(sources):
        second.import_pages(prefilled, source, request_id=number)
    second.import_pages(exported.prefilled, exported.layers(), request_id=9)
    outputs: dict[int, RequestOutput] = {}
    while 9 not in outputs:
        outputs.update((output.request_id, output) for output in second.step() if output.finished)
    wanted = whole(model, CONFIG, params)[0]
    assert outputs[9].token_ids == wanted.token_ids and outputs.keys() == {9}
    for source in sources:
        assert source.begun.wait(10)
    if end == "cancelled":
        for number in range(3):
            second.cancel(number)
    elif end == "stalled":
        monkeypatch.setattr("abyssal.engine.remote.STALLED_SECONDS", 0.0)
    elif end == "weights":
        second.update_weights(1)
    elif end == "closed":
        second.close()
    now = 6.0
    while second.unfinished:
        outputs.update((output.request_id, output) for output in second.step() if output.finished)
        second.scheduler.check()
    for number, source in enumerate(sources):
        assert not source.over.is_set()
        reason = end if end in ("cancelled", "deadline") else "length"
        assert outputs[number].finish_reason == reason
        assert reason != "length" or outputs[number].token_ids == wanted.token_ids
    before = second._cache.entries_PLSX.clone()
    for source in sources:
        source.let_go.set()
        assert source.over.wait(10)
    assert torch.equal(second._cache.entries_PLSX, before)
    assert "did not arrive" in caplog.text
