"""The engine: requests in, tokens out, a step at a time.

It puts scheduler, runner and pages in a row and turns what the scheduler says of sequences into outputs of requests.
Nothing here waits or prints; who calls :meth:`Engine.step` (the offline API, a server's loop) decides when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from abyssal.cache.paged import PagedCache, PageDtype
from abyssal.cache.pages import PAGE, PagePool
from abyssal.cache.prefix import PrefixCache
from abyssal.engine.gain import DraftGain, DraftStatistics
from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import Progress, Request, RequestOutput
from abyssal.engine.outputs import output_of
from abyssal.engine.random import fresh_seed
from abyssal.engine.runner import ModelRunner, cache_dtype
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.structured import StructureCompiler, open_reasoning
from abyssal.engine.weights import copy_weights
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineConfig:
    """Memory and choices of an engine."""

    cache_tokens: int | None = None
    """Tokens that the paged cache holds, rounded up to pages of 64; by default 16 times the model's length, as far as
    256 MiB go, and once its length in any case."""
    token_budget: int = 512
    """Tokens a step."""
    max_sequences: int = 64
    """Sequences that run at once."""
    prefix_cache: bool = True
    """Keep pages of ended requests for requests that begin alike."""
    deterministic: bool = False
    """Every token by the path of an undisturbed run; only pages of prompts are shared."""
    num_drafts: int | Literal["auto"] = 0
    """Tokens that the model's MTP modules draft for each sequence and step, to be verified in one pass; 0: none.
    ``auto``: as many as there are modules, as long as they make tokens come faster, which is measured."""
    preemption: Literal["recompute"] = "recompute"
    """What becomes of the pages of a preempted sequence."""
    page_dtype: PageDtype = "model"
    """What pages hold: values in the activations' dtype, or FP8 codes with their scales, about half of BF16's bytes."""


DEFAULT_CACHE_BYTES = 1 << 28


class Engine:
    """One model, its pages and the requests under way.

    Args:
        tokenizer: for text, stop texts and structures; without one the engine works on token ids.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig()
        spec = model.spec
        end = spec.eos_token_id
        self._ends = () if end is None else end if isinstance(end, tuple) else (end,)
        self._byte_strings = None if tokenizer is None else tokenizer.byte_strings(skip_control=True)
        self._tokenizer = tokenizer
        self._model = model
        self._asleep = False
        self._structures = None
        if tokenizer is not None:
            self._structures = StructureCompiler(tokenizer.to_json(), spec.vocab_size, self._ends)
        num_pages = self._num_pages(model, config)
        self._live: dict[int, LiveSequence] = {}
        self._requests: dict[int, list[LiveSequence]] = {}
        num_drafts = self._num_drafts(model, config)
        self._gain = DraftGain(num_drafts, clock) if config.num_drafts == "auto" and num_drafts else None
        cache = PagedCache(spec, num_pages, cache_dtype(model), page_dtype=config.page_dtype)
        self._runner = ModelRunner(model, cache, self._live, num_drafts)
        pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_positions=spec.max_positions,
                token_budget=config.token_budget,
                max_sequences=config.max_sequences,
                end_token_ids=self._ends,
                vocab_size=spec.vocab_size,
                num_drafts=num_drafts,
                draft_layers=num_drafts > 0,
                deterministic=config.deterministic,
                preemption=config.preemption,
            ),
            pool,
            PrefixCache(pool) if config.prefix_cache else None,
            clock,
        )

    @staticmethod
    def _num_drafts(model: Transformer, config: EngineConfig) -> int:
        if config.num_drafts == "auto":
            return len(model.mtp)
        if not isinstance(config.num_drafts, int):
            raise ValueError(f"num_drafts: {config.num_drafts!r} must be a number of tokens, 0 for none, or 'auto'")
        if config.num_drafts and not len(model.mtp):
            raise ValueError(
                f"num_drafts: {config.num_drafts} tokens cannot be drafted by a model without MTP modules; set it to 0"
            )
        return config.num_drafts

    @staticmethod
    def _num_pages(model: Transformer, config: EngineConfig) -> int:
        if config.cache_tokens is not None:
            return -(-config.cache_tokens // PAGE)
        longest = -(-model.spec.max_positions // PAGE)
        one = PagedCache(model.spec, 1, cache_dtype(model), page_dtype=config.page_dtype)
        fitting = DEFAULT_CACHE_BYTES // one.page_bytes
        return max(longest, min(16 * longest, fitting))

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never run as it stands, saying why; others are not touched.
        """
        params = request.params
        seed = fresh_seed() if params.seed is None else params.seed
        structure = None
        if params.structured is not None:
            if self._structures is None:
                raise ValueError("structured: the model has no tokenizer, so its output has no text to be of a form")
            waits_for = None if self._tokenizer is None else open_reasoning(self._tokenizer, request.prompt_ids)
            structure = self._structures.compile(params.structured, waits_for)
        completions = [
            LiveSequence(
                request,
                index,
                seed,
                self._ends,
                self._byte_strings,
                None if structure is None else structure.fork(),
            )
            for index in range(params.num_samples)
        ]
        self.scheduler.add(request)
        self._requests[request.request_id] = completions
        for number, sequence in self.scheduler.sequences.items():
            if sequence.request is request:
                self._live[number] = completions[sequence.index]

    def cancel(self, request_id: int) -> None:
        """End a request with what it has, now or with the step that it is in."""
        self.scheduler.cancel(request_id)

    @property
    def draft_statistics(self) -> DraftStatistics:
        """Drafts verified and accepted so far, by position."""
        return self._runner.draft_statistics

    @property
    def draft_acceptance(self) -> float | None:
        """Share of drafts that were accepted so far; None before any."""
        found = self.draft_statistics
        return sum(found.accepted) / sum(found.drafted) if any(found.drafted) else None

    @property
    def draft_gains(self) -> dict[int, float]:
        """With ``num_drafts="auto"``, by number of sequences: how many times as fast tokens come with drafts, where it
        was measured (:meth:`~abyssal.engine.gain.DraftGain.gains`)."""
        return {} if self._gain is None else self._gain.gains()

    @property
    def unfinished(self) -> bool:
        """Whether any request is under way."""
        return self.scheduler.unfinished

    def step(self) -> list[RequestOutput]:
        """One step; the outputs of the requests that it changed, those that ended among them.  The others' are to be
        looked at before the next step (:class:`~abyssal.engine.outputs.GrowingOutput`).

        Asleep, nothing is computed; requests that were cancelled, or whose deadline passed, still end.
        """
        if self._asleep:
            return self._outputs(self.scheduler.expire())
        most_drafts = None if self._gain is None else self._gain.begin(self.scheduler.num_writing)
        plan = self.scheduler.plan(most_drafts)
        results = self._runner.collect(self._runner.launch(plan))
        if self._gain is not None:
            self._gain.end(plan, results)
        return self._outputs(self.scheduler.update(plan, results))

    @property
    def weights_version(self) -> int:
        """Of the weights that compute the next step; 0 until :meth:`update_weights`."""
        return self._runner.weights_version

    def update_weights(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """The weights are other ones from here on: between steps, awake or asleep.

        Parameters are held by reference.  A trainer that changed them in place calls this before the next step;
        another hands in ``state``, which is copied into them, whole or not at all.  Cached entries were computed with
        the old weights, so every page is void, in memory and on disk; requests under way keep the tokens they have,
        compute their entries again, and go on.  Their outputs say which token is of which version.

        Args:
            version: larger than the last one.
            state: as in :func:`~abyssal.engine.weights.copy_weights`.

        Raises:
            ValueError: a version that does not rise, or a state that does not fit.  Nothing is changed then.
        """
        if version <= self.weights_version:
            raise ValueError(f"version: {version} must be above the present {self.weights_version}; count updates up")
        if state is not None:
            copy_weights(self._model, state)
        self._model.refresh(version)
        self._runner.weights_version = version
        self._drop_pages()
        for live in self._live.values():
            live.change_weights()

    @property
    def asleep(self) -> bool:
        """Whether the memory of the pages is given back."""
        return self._asleep

    def sleep(self) -> None:
        """Give the memory of the pages back, for a trainer on the same device; the parameters are not touched.

        Requests may be added and wait; those under way are computed again after :meth:`wake`.  What was cached in
        memory is lost.
        """
        if not self._asleep:
            self._drop_pages()
            self._runner.free()
            self._asleep = True

    def wake(self) -> None:
        """Take the memory of the pages again and go on."""
        if self._asleep:
            self._runner.allocate()
            self._asleep = False

    def _drop_pages(self) -> None:
        self.scheduler.drop_pages()
        self._runner.forget_all()

    def _outputs(self, progress: Iterable[Progress]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for request_id in dict.fromkeys([self._apply(each) for each in progress]):
            outputs.append(output_of(self._requests[request_id]))
            if outputs[-1].finished:
                del self._requests[request_id]
        return outputs

    def _apply(self, progress: Progress) -> int:
        live = self._requests[progress.request_id][progress.index]
        live.cached_tokens = progress.cached_tokens
        if progress.finish_reason is not None:
            live.finish(progress.finish_reason, progress.detail)
            self._live.pop(progress.sequence, None)
            self._runner.forget(progress.sequence)
        return progress.request_id
