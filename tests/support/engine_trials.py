"""Trials of the engine: requests that come and go at random, and what each of them would have got alone.

A trial is data, drawn by hypothesis before anything runs: an engine's configuration, requests with the step of their
arrival, which of them are cancelled when, and when the engine sleeps.  Time is counted in steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from abyssal.cache.paged import PageDtype
from abyssal.cache.pages import PAGE
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import CompletionOutput, Request, RequestOutput, SamplingParams, TokenLogprobs
from abyssal.engine.random import fork_seed
from abyssal.engine.stored import StoredPages
from abyssal.model.transformer import Transformer
from abyssal.spec.model import GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec, MoESpec
from tests.support.page_stores import SPACE, MemoryStore

VOCAB = 24
LONGEST_OUTPUT = 80
POSITIONS = 512
SPECS = {
    "latent": ModelSpec(
        family="deepseek_v3",
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        dense_ffn_size=40,
        attention=LatentAttentionSpec(
            num_heads=2, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoESpec(num_experts=4, num_shared_experts=1, top_k=2, expert_ffn_size=24, num_groups=2, num_kept_groups=1),
        num_dense_layers=1,
        mtp_depth=1,
        max_positions=POSITIONS,
        init_std=0.3,
        eos_token_id=1,
    ),
    "dense": ModelSpec(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        dense_ffn_size=40,
        attention=GroupedQueryAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8),
        moe=None,
        num_dense_layers=0,
        mtp_depth=0,
        max_positions=POSITIONS,
        init_std=0.3,
        rope_interleaved=False,
        eos_token_id=1,
    ),
}


def trial_model(kind: str, dtype: torch.dtype) -> Transformer:
    """Small, with logits of a few units: what is sampled from it is not decided beforehand."""
    model = Transformer(SPECS[kind], dtype=dtype)
    model.init_weights(torch.Generator().manual_seed(5))
    return model


@dataclass(frozen=True)
class Arrival:
    """A request and what befalls it."""

    gap: int
    """Steps after the one before; fewer where the engine has nothing to do."""
    text: int
    """Its prompt is the beginning of this text, ..."""
    length: int
    follows: bool
    """... after what the newest request that has ended by then read and wrote, if so, and short."""
    params: SamplingParams
    priority: int = 0
    user: str = ""
    namespace: str = ""
    cancelled_after: int | None = None
    """Steps after its arrival."""
    expires_after: int | None = None
    """Steps after its arrival: its deadline."""


@dataclass(frozen=True)
class Trial:
    config: EngineConfig
    arrivals: tuple[Arrival, ...]
    sleeps: frozenset[int] = field(default_factory=frozenset)
    """Steps before which the engine sleeps and wakes."""
    stores: bool = False
    """Pages outlive the engine, in a store that later trials find full."""


def texts(count: int, vocab_size: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, vocab_size, (count, POSITIONS), generator=generator).tolist()


LENGTHS = (1, 40, 63, 64, 65, 127, 128, 128, 130, 130, 200)
OUTPUTS = (6, 12, 30, LONGEST_OUTPUT)
SEVERAL: tuple[dict[str, Any], ...] = ({}, {}, {}, {}, {}, {"n": 2}, {"n": 3}, {"n": 1, "best_of": 2})
CHOICES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 9},
    {"temperature": 0.7, "logit_bias": {3: 4.0, 7: 4.0}},  # drafts are accepted
    {"temperature": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 5},
)
SEEDS = st.integers(0, 2**32)
"""Hypothesis draws how many things there are, and a seed for each, so that it can leave some out of a failing trial;
left to itself it prefers what is extreme, and everything is cancelled at once."""


def _sampling(rng: Random, most: int) -> SamplingParams:
    """Few kinds, so that trials ask for the same things and what a request gets alone is known already."""
    choice = rng.choice(CHOICES)
    return SamplingParams(
        **choice,
        **(rng.choice(SEVERAL) if choice["temperature"] else {}),
        seed=rng.randrange(3),
        max_tokens=rng.choice([count for count in OUTPUTS if count <= most]),
        ignore_eos=rng.random() < 0.7,
        logprobs=1,
        prompt_logprobs=0 if rng.random() < 0.1 else None,
        return_experts=rng.random() < 0.1,
    )


def _arrival(seed: int, pages: int) -> Arrival:
    rng = Random(seed)
    length = rng.choice(LENGTHS)
    return Arrival(
        gap=rng.choice((0, 0, 1, 3, 10, 40, 100)),
        text=rng.choice((0, 0, 0, 1)),
        length=length,
        follows=rng.random() < 0.4,
        params=_sampling(rng, pages * PAGE - length),
        priority=rng.choice((0, 0, 0, 1, 2)),
        user=rng.choice(("", "a")),
        namespace=rng.choice(("", "", "", "", "", "b")),
        cancelled_after=rng.choice((0, 1, 2, 5, 20)) if rng.random() < 0.2 else None,
        expires_after=rng.choice((0, 3, 10, 30)) if rng.random() < 0.1 else None,
    )


@st.composite
def trials(draw: st.DrawFn, deterministic: bool, drafts: int, page_dtype: PageDtype) -> Trial:
    """Memory from hardly one request to more than all of them."""
    rng = Random(draw(SEEDS))
    stores = rng.random() < 0.3
    pages = rng.choice((4, 5, 5, 6, 8, 12, 40))
    config = EngineConfig(
        cache_tokens=pages * PAGE,
        token_budget=rng.choice((8, 24, 64, 512)),
        max_sequences=rng.choice((3, 5, 8)),
        prefix_cache=rng.random() < 0.8,
        deterministic=deterministic,
        num_drafts=rng.choice((0, *range(drafts + 1), "auto")) if drafts else 0,
        preemption=rng.choice(("recompute", "offload")) if stores else "recompute",
        page_dtype=page_dtype,
    )
    coming = [_arrival(seed, pages) for seed in draw(st.lists(SEEDS, min_size=3, max_size=9))]
    sleeps = frozenset({7, 30} if rng.random() < 0.2 else ())
    return Trial(config, tuple(coming), sleeps, stores)


@dataclass(frozen=True)
class Result:
    arrival: Arrival
    request: Request
    output: RequestOutput


class TrialRun:
    """A trial on an engine, with its pages accounted for at every step."""

    def __init__(
        self, trial: Trial, model: Transformer, texts: list[list[int]], store: MemoryStore | None = None
    ) -> None:
        self.step = 0
        stored = StoredPages(store, SPACE) if trial.stores and store is not None else None
        self.engine = Engine(model, config=trial.config, clock=lambda: float(self.step), stored=stored)
        self._trial = trial
        self._texts = texts
        self._requests: dict[int, Request] = {}
        self._seen: dict[int, RequestOutput] = {}

    def run(self) -> list[Result]:
        coming = list(enumerate(self._trial.arrivals))
        due = coming[0][1].gap
        cancels: dict[int, list[int]] = {}
        while coming or self.engine.unfinished:
            while coming and (due <= self.step or not self.engine.unfinished):
                number, arrival = coming.pop(0)
                self._add(number, arrival)
                if arrival.cancelled_after is not None:
                    cancels.setdefault(self.step + arrival.cancelled_after, []).append(number)
                due = self.step + (coming[0][1].gap if coming else 0)
            for number in cancels.pop(self.step, ()):
                self.engine.cancel(number)
            if self.step in self._trial.sleeps:
                self.engine.sleep()
                self.engine.wake()
            for output in self.engine.step():
                self._seen[output.request_id] = output
            self._check()
            self.step += 1
            assert self.step < 20_000, "the engine makes no progress"
        self.engine.close()
        assert not self.engine.scheduler.sequences  # so that check() finds every page free, or the prefix cache's
        self._check()
        arrivals = self._trial.arrivals
        return [Result(arrivals[number], request, self._seen[number]) for number, request in self._requests.items()]

    def _check(self) -> None:
        self.engine.scheduler.check()
        prefix = self.engine.scheduler._memory.prefix
        if prefix is not None:
            prefix.check()

    def _add(self, number: int, arrival: Arrival) -> None:
        prompt = self._texts[arrival.text][: arrival.length]
        ended = [output for output in self._seen.values() if output.finished and output.token_ids]
        if arrival.follows and ended:
            prompt = [*ended[-1].prompt_ids, *ended[-1].token_ids, *prompt[:7]]
        deadline = None if arrival.expires_after is None else float(self.step + arrival.expires_after)
        request = Request(
            number, tuple(prompt), arrival.params, arrival.user, arrival.namespace, arrival.priority, deadline
        )
        try:
            self.engine.add(request)
        except ValueError as error:  # too long for this memory, more completions than run at once
            assert str(error).startswith(("prompt: ", "n: ", "best_of: ")), error
        else:
            self._requests[number] = request


@dataclass(frozen=True)
class Alone:
    """What one completion gets when nothing else is there."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    experts_TLK: Any
    ended: bool
    """By an end token, and not by length."""

    def begins(self, output: CompletionOutput) -> bool:
        """Whether an output has these tokens and log-probabilities, as far as it goes."""
        count = len(output.token_ids)
        return self.tokens[:count] == output.token_ids and self.logprobs[:count] == output.logprobs


class Reference:
    """Requests alone in an engine of their own, each completion by itself: remembered, since trials ask alike."""

    def __init__(self, model: Transformer, page_dtype: PageDtype) -> None:
        self.model = model
        self.config = EngineConfig(deterministic=True, prefix_cache=False, page_dtype=page_dtype)
        self.store = MemoryStore()
        """Of trials of this model."""
        self._known: dict[tuple[tuple[int, ...], str], Alone] = {}

    def of(self, request: Request, index: int) -> Alone:
        """Completion ``index``."""
        params = request.params
        seed = fork_seed(params.seed or 0, index)
        alone = replace(params, seed=seed, n=1, best_of=None, prompt_logprobs=0, return_experts=True, logprobs=1)
        key = request.prompt_ids, repr(alone)
        if key not in self._known:
            self._known[key] = self._run(Request(0, request.prompt_ids, alone))
        return self._known[key]

    def _run(self, request: Request) -> Alone:
        engine = Engine(self.model, config=self.config)
        engine.add(request)
        outputs: list[RequestOutput] = []
        while engine.unfinished:
            outputs = engine.step()
        (output,) = outputs
        first = output.outputs[0]
        assert output.error is None and first.logprobs is not None and output.prompt_logprobs is not None
        ended = first.finish_reason == "stop"
        return Alone(first.token_ids, first.logprobs, output.prompt_logprobs, first.experts, ended)

    def score(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of output ``tokens`` as if they were the prompt's, the likeliest beside them."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        engine = Engine(self.model, config=self.config)
        engine.add(Request(0, (*request.prompt_ids, *tokens), params))
        outputs: list[RequestOutput] = []
        while engine.unfinished:
            outputs = engine.step()
        scored = outputs[0].prompt_logprobs or ()
        return tuple(each for each in scored[len(request.prompt_ids) :] if each is not None)


def assert_as_alone(result: Result, reference: Reference, pages: int) -> None:
    """Bit for bit what the request gets alone; of one that was cut short, its beginning."""
    request, output, params = result.request, result.output, result.request.params
    assert output.error is None, output.error
    limit = min(params.max_tokens or POSITIONS, pages * PAGE - len(request.prompt_ids))
    alone = [reference.of(request, index) for index in range(params.num_samples)]
    if params.best_of is not None:
        alone = sorted(alone, key=lambda each: _mean(each, limit), reverse=True)
        # Ranked by what they had, if any was cut short, be it one that is not shown.
        if result.arrival.cancelled_after is not None or request.deadline is not None:
            alone = [next(a for a in alone if a.begins(each)) for each in output.outputs]
    assert len(output.outputs) == params.n
    for found, wanted in zip(output.outputs, alone, strict=False):
        assert wanted.begins(found)
        if not _is_cut(found):
            assert len(found.token_ids) == min(limit, len(wanted.tokens))
            ended = wanted.ended and len(found.token_ids) == len(wanted.tokens)
            assert found.finish_reason == ("stop" if ended else "length")
        _assert_same_experts(result, found, wanted)
    if params.prompt_logprobs is not None and not any(_is_cut(each) for each in output.outputs):
        assert output.prompt_logprobs == alone[0].prompt_logprobs


def _assert_same_experts(result: Result, found: CompletionOutput, wanted: Alone) -> None:
    if not result.request.params.return_experts or wanted.experts_TLK is None:
        return
    if not _is_cut(found):
        assert found.experts is not None
        assert len(found.experts) == len(result.request.prompt_ids) + len(found.token_ids) - 1
    if found.experts is not None:
        assert (found.experts == wanted.experts_TLK[: len(found.experts)]).all()


def _is_cut(output: CompletionOutput) -> bool:
    return output.finish_reason in ("cancelled", "deadline")


def _mean(alone: Alone, limit: int) -> float:
    logprobs = [each.logprob for each in alone.logprobs[:limit]]
    return sum(logprobs) / max(1, len(logprobs))


@dataclass(frozen=True)
class Gap:
    """How far a request in default mode is from one alone."""

    largest: float
    """Difference of an output token's log-probability from that of the same token computed as a prompt's."""
    regret: float
    """By which a greedy token was not the likeliest there."""
    tokens: int
    strayed: int
    """Completions that are not those of the request alone."""


def gap_of(result: Result, reference: Reference) -> Gap:
    """Of all its completions (each of ``best_of`` is taken for its own)."""
    request, params = result.request, result.request.params
    largest, regret, tokens, strayed = 0.0, 0.0, 0, 0
    alone = [reference.of(request, index) for index in range(params.num_samples)]
    for index, found in enumerate(result.output.outputs):
        scored = reference.score(request, found.token_ids)
        for ours, theirs in zip(found.logprobs or (), scored, strict=True):
            assert ours.token_id == theirs.token_id
            largest = max(largest, abs(ours.logprob - theirs.logprob))
            if not params.temperature:
                regret = max(regret, theirs.top[0][1] - theirs.logprob)
        tokens += len(found.token_ids)
        candidates = alone if params.best_of is not None else [alone[index]]
        strayed += not any(each.tokens[: len(found.token_ids)] == found.token_ids for each in candidates)
    return Gap(largest, regret, tokens, strayed)
