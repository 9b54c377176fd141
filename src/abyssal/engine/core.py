"""The engine: requests in, tokens out, a step at a time.

It puts scheduler, runner and pages in a row and turns what the scheduler says of sequences into outputs of requests.
Nothing here waits or prints; who calls :meth:`Engine.step` (the offline API, a server's loop) decides when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abyssal.cache.paged import PagedCache
from abyssal.cache.pages import PagePool
from abyssal.cache.prefix import PrefixCache
from abyssal.engine.config import EngineConfig
from abyssal.engine.gain import DraftGain, DraftStatistics
from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import Path, Progress, Request, RequestOutput, StepPlan
from abyssal.engine.moving import Arrival, PageMover
from abyssal.engine.outputs import output_of
from abyssal.engine.random import fresh_seed
from abyssal.engine.runner import ModelRunner, cache_dtype
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.stored import StoredPages
from abyssal.engine.structured import Structure, StructureCompiler, open_reasoning
from abyssal.engine.transfer import Exported, IncomingLayers, LayerPages, Prefilled, TensorBytes
from abyssal.engine.weights import copy_weights, weights_fingerprint
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer

IMPORT_SECONDS = 0.05
"""How long a step that has nothing to compute waits for pages on their way."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Held:
    """A request that ended after its prompt, until its pages are released."""

    number: int
    live: LiveSequence


class Engine:
    """One model, its pages and the requests under way.

    Args:
        tokenizer: for text, stop texts and structures; without one the engine works on token ids.
        clock: seconds, for deadlines.
        stored: where pages are kept beyond this engine; its own, and whoever made it closes it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        stored: StoredPages | None = None,
    ) -> None:
        config = config or EngineConfig()
        if config.preemption == "offload" and stored is None:
            logger.warning("preemption: without a disk cache nothing can be offloaded, so pages are computed again")
            config = replace(config, preemption="recompute")
        spec = model.spec
        end = spec.eos_token_id
        self._ends = () if end is None else end if isinstance(end, tuple) else (end,)
        self._byte_strings = None if tokenizer is None else tokenizer.byte_strings(skip_control=True)
        self._tokenizer = tokenizer
        self._model = model
        self._asleep = False
        self.on_phase: Callable[[str, StepPlan | None], object] | None = None
        """Told when a phase of a step is over, and of which plan, while somebody records steps."""
        self._untold: list[int] = []  # requests that a failed step ended
        self._fingerprint: str | None = None
        self._structures = None
        if tokenizer is not None:
            self._structures = StructureCompiler(tokenizer.to_json(), spec.vocab_size, self._ends)
        num_pages = config.num_pages(model)
        self._num_pages, self._config = num_pages, config
        self._live: dict[int, LiveSequence] = {}
        self._requests: dict[int, list[LiveSequence]] = {}
        num_drafts = config.drafts(model)
        self._gain = DraftGain(num_drafts, clock) if config.num_drafts == "auto" and num_drafts else None
        cache = PagedCache(spec, num_pages, cache_dtype(model), page_dtype=config.page_dtype)
        self._cache, self._stored, self._clock = cache, stored, clock
        self._held: dict[int, _Held] = {}
        if stored is not None:
            stored.bind(f"{cache.layout} mtp {min(len(model.mtp), num_drafts)}")
        paths: tuple[Path, ...] = ("prompt",) if config.deterministic else ("prompt", "decode")
        self._mover = PageMover(cache, self._live, stored, paths)
        self._runner = ModelRunner(model, cache, self._live, self._mover, num_drafts)
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        self.pool = PagePool(self._num_pages)
        return Scheduler(
            self._config.of_scheduler(self._model, self._ends),
            self.pool,
            PrefixCache(self.pool) if self._config.prefix_cache else None,
            self._clock,
            self._stored,
        )

    def add(self, request: Request, structure: Structure | None = None) -> None:
        """Queue a request.

        Args:
            structure: what :meth:`compile` made of it, where that was called before.

        Raises:
            ValueError: it can never run as it stands, saying why; others are not touched.
        """
        self._add(request, fresh_seed() if request.params.seed is None else request.params.seed, structure)

    def _add(self, request: Request, seed: int, structure: Structure | None = None) -> range:
        """The numbers of its sequences."""
        if request.request_id in self._requests:  # a cancelled one too, until a step has told of its end
            raise ValueError(
                f"request_id: {request.request_id} is that of a request still under way; give each its own"
            )
        structure = structure or self.compile(request)
        completions = [
            LiveSequence(
                request,
                index,
                seed,
                self._ends,
                self._byte_strings,
                None if structure is None else structure.fork(),
            )
            for index in range(request.params.num_samples)
        ]
        numbers = self.scheduler.add(request)
        self._requests[request.request_id] = completions
        self._live.update(zip(numbers, completions, strict=True))
        return numbers

    def compile(self, request: Request) -> Structure | None:
        """The form of its output; None where it may have any.  Other threads may call it while steps run.

        Raises:
            ValueError: the form cannot be read, or cannot be met.
        """
        if request.params.structured is None:
            return None
        if self._structures is None:
            raise ValueError("structured: the model has no tokenizer, so its output has no text to be of a form")
        waits_for = None if self._tokenizer is None else open_reasoning(self._tokenizer, request.prompt_ids)
        return self._structures.compile(request.params.structured, waits_for)

    def warm_up(self) -> None:
        """Prepare what a first request would otherwise wait for, and others with it."""
        if self._structures is not None:
            self._structures.prepare()

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
    def expert_loads(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer with experts, the share of recent tokens' choices that each expert got."""
        return self._runner.loads.shares()

    @property
    def unfinished(self) -> bool:
        """Whether any request is under way."""
        return self.scheduler.unfinished

    def step(self) -> list[RequestOutput]:
        """One step; the outputs of the requests that it changed, those that ended among them.  The others' are to be
        looked at before the next step (:class:`~abyssal.engine.outputs.GrowingOutput`).

        Where nothing can be computed before pages have come from elsewhere, it waits for them, for a moment.  Asleep,
        nothing is computed; requests that were cancelled, or whose deadline passed, still end.

        An exception or an interrupt, wherever it comes, ends every request under way as an error, which the next step
        tells of, and the engine can go on with others.
        """
        try:
            outputs = self._outputs(self.scheduler.expire() if self._asleep else self._step())
        except BaseException as error:
            self._start_over(error)
            raise
        return self._told() + outputs

    def _step(self) -> list[Progress]:
        self._mover.give_up([n for n in self._mover.filling if self.scheduler.sequences[n].ending is not None])
        self._take_in(self._mover.arrivals())
        self._mover.store(self.scheduler.take_prefixes())
        most_drafts = None if self._gain is None else self._gain.begin(self.scheduler.num_writing)
        plan = self.scheduler.plan(most_drafts)
        self._phase("plan", plan)
        self._note_beginnings(plan)
        begun = time.perf_counter()
        launched = self._runner.launch(plan)
        self._phase("launch")
        results = self._runner.collect(launched)
        self._phase("collect")
        if self._gain is not None:
            self._gain.end(plan, results)
        self._note_rate(plan, time.perf_counter() - begun)
        progress = self.scheduler.update(plan, results)
        self._mover.store(self.scheduler.take_prefixes())
        if not plan.chunks and self._mover.waiting:
            self._take_in(self._mover.arrivals(IMPORT_SECONDS))
            progress += self.scheduler.take_progress()
        return progress

    def _note_beginnings(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            live = self._live[chunk.sequence]
            if live.began is None:
                live.began = self._clock()

    def _phase(self, name: str, plan: StepPlan | None = None) -> None:
        if self.on_phase is not None:
            self.on_phase(name, plan)

    def _start_over(self, error: BaseException) -> None:
        """A step was broken off, and what it did to any page or to the books is not known: begin new ones.  What was
        cached in memory, or held for export, is lost with them."""
        self._mover.forget_all()
        self._runner.forget_all()
        ended, self.scheduler = self.scheduler, self._new_scheduler()
        self.scheduler.num_preemptions, self.scheduler.totals = ended.num_preemptions, ended.totals
        self._live.clear()
        self._held.clear()
        detail = f"the step that it was in failed: {type(error).__name__} {error}"
        for live in (live for completions in self._requests.values() for live in completions):
            if live.finish_reason is None:
                live.finish("error", detail)
        self._untold = list(self._requests)

    def _told(self) -> list[RequestOutput]:
        """Ends that no step has told of."""
        untold, self._untold = self._untold, []
        return [output_of(self._requests.pop(request_id)) for request_id in untold]

    @property
    def weights_version(self) -> int:
        """Of the weights that compute the next step; 0 until :meth:`update_weights`."""
        return self._runner.weights_version

    @property
    def weights_fingerprint(self) -> str:
        """Names the present weights (:func:`~abyssal.engine.weights.weights_fingerprint`)."""
        if self._fingerprint is None:
            self._fingerprint = weights_fingerprint(self._model)
        return self._fingerprint

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
        self._runner.weights_version, self._fingerprint = version, None
        self._drop_pages()
        if self._stored is not None:
            self._stored.change_weights(version)
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
        self.settle()
        self._mover.store(self.scheduler.take_prefixes())
        for request_id in list(self._held):
            self.release_pages(request_id)
        self.scheduler.drop_pages()
        self._runner.forget_all()

    def _outputs(self, progress: Iterable[Progress]) -> list[RequestOutput]:
        changed = dict.fromkeys([self._apply(each) for each in progress])
        outputs = [output_of(self._requests[request_id]) for request_id in changed]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def _take_in(self, arrivals: Iterable[Arrival]) -> None:
        for each in arrivals:
            num_drafts = len(self._live[each.sequence].drafts) if each.keeps_drafts else 0
            self.scheduler.imported(each.sequence, each.num_tokens, each.path, num_drafts)

    def _note_rate(self, plan: StepPlan, seconds: float) -> None:
        if self._stored is None or not any(chunk.path == "prompt" for chunk in plan.chunks):
            return
        read = sum(chunk.num_tokens for chunk in plan.chunks if chunk.path == "prompt")
        if 2 * read > plan.num_tokens:
            self._stored.note_computed(read, seconds)

    def settle(self) -> None:
        """Wait for pages on their way, those of other engines given up: before the weights change or memory is."""
        self._mover.give_up(self._mover.filling)
        while self._mover.waiting:
            self._take_in(self._mover.arrivals(IMPORT_SECONDS))

    def close(self) -> None:
        """Let go of threads, once what they do is done.  The engine can go on."""
        self.settle()
        self._mover.close()

    def export_pages(self, request_id: int) -> Exported:
        """A request that ended after its prompt (``prefill_only``), for another engine to go on with.

        Its pages stay until :meth:`release_pages`.

        Raises:
            ValueError: no such request, or it ended for another reason.
        """
        held = self._held_request(request_id)
        number, live = held.number, held.live
        transfer = self.scheduler.export(number)
        request = live.request
        going_on = replace(
            request,
            prefill_only=False,
            output_ids=tuple(live.tokens[live.num_prompt :]),
            imported_tokens=transfer.num_tokens,
            deadline=None,
        )
        prefilled = Prefilled(
            going_on,
            self._cache.layout,
            self._cache.entries_PLSX.shape[1],
            self.weights_fingerprint,
            live.seed,
            "prompt" if self.scheduler.sequences[number].prompt_path >= transfer.num_tokens else "decode",
            live.cached_tokens,
            None if request.deadline is None else request.deadline - self._clock(),
            self._runner.draft_state(number),
            tuple(live.logprobs),
            tuple(live.prompt_logprobs) if request.params.prompt_logprobs is not None else (),
            tuple(live.versions),
            tuple(None if rows is None else TensorBytes.of(torch.from_numpy(rows)) for rows in live.experts),
        )
        return Exported(prefilled, transfer.pages, self._cache, lambda: self._held.get(request_id) is held)

    def release_pages(self, request_id: int) -> None:
        """The pages of a prefilled request are no longer needed.

        Raises:
            ValueError: as :meth:`export_pages`.
        """
        number = self._held_request(request_id).number
        del self._held[request_id], self._live[number]
        self._runner.forget(number)
        self.scheduler.release(number)

    def _held_request(self, request_id: int) -> _Held:
        held = self._held.get(request_id)
        if held is None:
            raise ValueError(f"request_id: {request_id} holds no pages: only a request that ended 'prefilled' does")
        return held

    def import_pages(self, prefilled: Prefilled, layers: Iterable[LayerPages], request_id: int | None = None) -> None:
        """Go on with a request that another engine has prefilled.

        Args:
            layers: taken in a thread when the request begins; where they fail, its pages are computed here.
            request_id: in this engine; by default the same.

        Raises:
            ValueError: pages of another layout or of other weights, or what :meth:`add` raises.
        """
        if (prefilled.layout, prefilled.num_layers) != (self._cache.layout, self._cache.entries_PLSX.shape[1]):
            raise ValueError(
                f"layout: pages are {prefilled.layout!r} there and {self._cache.layout!r} here; "
                "both engines need the same model, dtype and page_dtype"
            )
        if prefilled.weights != self.weights_fingerprint:
            raise ValueError(
                f"weights: pages were computed with {prefilled.weights}, and this engine has "
                f"{self.weights_fingerprint}; load the same checkpoint into both, and update them together"
            )
        deadline = None if prefilled.seconds_left is None else self._clock() + prefilled.seconds_left
        number_there = prefilled.request.request_id
        request = replace(
            prefilled.request, request_id=number_there if request_id is None else request_id, deadline=deadline
        )
        (number,) = self._add(request, prefilled.seed)
        self._live[number].resume(prefilled)
        self._runner.resume_drafting(number, prefilled.draft)
        self._mover.expect(number, IncomingLayers(layers, prefilled.num_layers, prefilled.path))

    def _apply(self, progress: Progress) -> int:
        live = self._requests[progress.request_id][progress.index]
        live.note_cached(progress.cached_tokens)
        if progress.finish_reason is not None:
            live.finish(progress.finish_reason, progress.detail)
            if progress.finish_reason == "prefilled":
                self._held[progress.request_id] = _Held(progress.sequence, live)
            else:
                self._live.pop(progress.sequence, None)
                self._runner.forget(progress.sequence)
        return progress.request_id
