"""The scheduler over a runner that computes hashes instead of a model.

A slot of the cache holds the path by which its token was computed and a hash over the token, its path and all slots
before it.  So whatever goes wrong with pages (shared too long, copied too late, overwritten, brought back to the wrong
place, computed by the wrong path) shows up as a wrong hash, at once and in the tokens that are sampled from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from abyssal.cache.pages import PAGE, PagePool
from abyssal.cache.prefix import PrefixCache
from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.messages import Chunk, Path, Progress, Request, Sampled, StepPlan, Transfer
from abyssal.engine.request import Status
from abyssal.engine.scheduler import Scheduler

VOCABULARY = 40
Slot = tuple[Path, int]
BEGIN: Slot = ("prompt", 17)


def entry(before: Slot, token: int, path: Path) -> Slot:
    """What computing ``token`` after ``before`` writes.  The default mode's shared pages are of either path, so the
    path is kept beside the hash and not in it."""
    return path, hash((before[1], token))


def sample(slot: Slot, seed: int, index: int, by_path: bool) -> int:
    """The token after a slot, for one of a request's completions."""
    return hash((slot[1], seed, index, by_path and slot[0] == "prompt")) % VOCABULARY


@dataclass
class DiskOfHashes:
    """A cache on disk: pages by the tokens up to their end."""

    pages: dict[tuple[str, tuple[int, ...]], list[Slot]] = field(default_factory=dict)

    def lookup(self, tokens: Sequence[int], namespace: bytes, paths: Collection[Path]) -> int:
        count = 0
        while (count + 1) * PAGE <= len(tokens):
            page = self.pages.get((namespace.decode(), tuple(tokens[: (count + 1) * PAGE])))
            if page is None or not {path for path, _ in page} <= set(paths):
                break
            count += 1
        return count * PAGE


class SimulatedEngine:
    """Steps a scheduler, checking every invariant on the way.

    Args:
        slow_imports: imports arrive only when :meth:`deliver` is called.
        most_drafts: asked before each plan; None leaves it to the configuration.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_pages: int,
        prefix: bool = True,
        disk: DiskOfHashes | None = None,
        slow_imports: bool = False,
        most_drafts: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.now = 0.0
        self.config = config
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(self.pool) if prefix else None
        self.disk = disk
        self.scheduler = Scheduler(config, self.pool, self.prefix, lambda: self.now, disk)
        self.slots: list[list[Slot | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.moved_out: dict[int, list[Slot | None]] = {}
        self.remote: dict[int, list[Slot | None]] = {}
        """By request: what another engine exported."""
        self.drafts: dict[int, list[int]] = {}
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.ends: dict[tuple[int, int], Progress] = {}
        self.steps_to_end: dict[int, int] = {}
        self.steps = 0
        self.num_computed = 0
        self.slow_imports = slow_imports
        self.most_drafts = most_drafts
        self._on_the_way: list[Transfer] = []
        self._next: dict[int, int] = {}
        self._seen: dict[int, list[Slot | None]] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        for index in range(request.params.num_samples):
            self.outputs[request.request_id, index] = list(request.output_ids)

    def run(self, most_steps: int = 5000) -> None:
        while self.scheduler.unfinished:
            assert self.steps < most_steps, "a request does not end"
            self.step()
            self.deliver()

    def step(self) -> StepPlan:
        resident = {number for number, s in self.scheduler.sequences.items() if s.pages}
        most_drafts = self.most_drafts()
        plan = self.scheduler.plan(most_drafts)
        wanted = self.config.num_drafts if most_drafts is None else min(most_drafts, self.config.num_drafts)
        assert plan.wanted_drafts == wanted and all(chunk.num_drafts <= wanted for chunk in plan.chunks)
        self.check()
        self._check_plan(plan, resident)
        self._move(plan)
        results: dict[int, Sampled] = {}
        for chunk in plan.chunks:
            self._compute(chunk, results, plan.wanted_drafts)
        if not self.slow_imports:
            self.deliver()
        for progress in self.scheduler.update(plan, results):
            self._take(progress)
        self.steps += 1
        for finished in self.scheduler.take_prefixes():
            self._save(finished.namespace, finished.tokens, finished.pages, finished.num_prompt_path)
        self.check()
        return plan

    def deliver(self, num_tokens: int | None = None) -> None:
        """Let the imports under way arrive, or the first ``num_tokens`` of each."""
        on_the_way, self._on_the_way = self._on_the_way, []
        for transfer in on_the_way:
            count = transfer.num_tokens if num_tokens is None else min(num_tokens, transfer.num_tokens)
            found = self._incoming(transfer)[:count]
            for offset, slot in enumerate(found):
                position = transfer.start % PAGE + offset
                self.slots[transfer.pages[position // PAGE]][position % PAGE] = slot
            of_prompt = all(slot is not None and slot[0] == "prompt" for slot in found)
            self.scheduler.imported(transfer.sequence, count, "prompt" if of_prompt else "decode")

    def check(self) -> None:
        self.scheduler.check()
        if self.prefix is not None:
            self.prefix.check()

    def _check_plan(self, plan: StepPlan, resident: set[int]) -> None:
        assert plan.num_tokens <= self.config.token_budget
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
        first, second = plan.split()
        assert sorted((*first.chunks, *second.chunks), key=plan.chunks.index) == list(plan.chunks)
        longest = max((chunk.num_tokens for chunk in plan.chunks), default=0)
        assert abs(first.num_tokens - second.num_tokens) <= longest
        moved = {transfer.sequence for transfer in plan.imports}
        self._next = {number: stop for number, stop in self._next.items() if number in resident - moved}
        written: set[int] = set()
        for chunk in plan.chunks:
            if chunk.sequence in self._next:
                assert chunk.start == self._next[chunk.sequence], "a position is left out or computed twice"
            pages = chunk.pages[chunk.start // PAGE :]
            assert all(self.pool.references(page) == 1 and not self.pool.kept(page) for page in pages), "not its own"
            assert written.isdisjoint(pages)
            written.update(pages)

    def _move(self, plan: StepPlan) -> None:
        for transfer in plan.exports:
            self.moved_out[transfer.sequence] = self._read(transfer.pages, transfer.num_tokens)
        for source, target in plan.copies:
            self.slots[target] = list(self.slots[source])
        for transfer in plan.imports:
            for page in transfer.pages:
                self.slots[page] = [None] * PAGE
        self._on_the_way += plan.imports

    def _incoming(self, transfer: Transfer) -> list[Slot | None]:
        sequence = self.scheduler.sequences[transfer.sequence]
        if transfer.kind == "offload":
            return self.moved_out.pop(transfer.sequence)
        if transfer.kind == "remote":
            return self.remote[sequence.request.request_id][: transfer.num_tokens]
        assert self.disk is not None and transfer.start % PAGE == 0
        found: list[Slot | None] = []
        for stop in range(transfer.start + PAGE, transfer.start + transfer.num_tokens + 1, PAGE):
            found += self.disk.pages[sequence.request.namespace, tuple(sequence.tokens[:stop])]
        return found

    def _read(self, pages: Sequence[int], count: int) -> list[Slot | None]:
        return [slot for page in pages for slot in self.slots[page]][:count]

    def _save(self, namespace: str, tokens: tuple[int, ...], pages: Sequence[int], num_prompt_path: int) -> None:
        slots = self._read(pages, len(tokens))
        self._check_chain(slots, tokens)
        assert len(tokens) == len(pages) * PAGE
        assert all(slot is not None and slot[0] == "prompt" for slot in slots[:num_prompt_path])
        if self.disk is not None:
            for stop in range(PAGE, len(tokens) + 1, PAGE):
                page = [slot for slot in slots[stop - PAGE : stop] if slot is not None]
                self.disk.pages.setdefault((namespace, tokens[:stop]), page)

    def _check_chain(self, slots: Sequence[Slot | None], tokens: Sequence[int]) -> None:
        before = BEGIN
        for position, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            assert slot is not None and slot == entry(before, token, slot[0]), f"position {position} holds another text"
            before = slot

    def _compute(self, chunk: Chunk, results: dict[int, Sampled], wanted: int) -> None:
        sequence = self.scheduler.sequences[chunk.sequence]
        known, path = sequence.tokens, chunk.path
        assert list(chunk.tokens) == known[chunk.start : chunk.start + len(chunk.tokens)]
        assert chunk.next_token == (None if chunk.samples else known[chunk.stop])
        before = self._read(chunk.pages, chunk.start)
        if before != self._seen.get(chunk.sequence):  # compared as a whole where nothing has happened since
            self._check_chain(before, known[: chunk.start])
            self._check_paths(before, sequence.num_prompt)
        if self.config.deterministic:
            assert path == ("prompt" if chunk.start < sequence.num_prompt else "decode")
            assert path == "decode" or chunk.stop <= sequence.num_prompt
        drafts = self.drafts.pop(chunk.sequence, [])[: chunk.num_drafts]
        assert len(drafts) == chunk.num_drafts
        written: list[Slot] = []
        slot = before[-1] if before else BEGIN
        for offset, token in enumerate((*chunk.tokens, *drafts)):
            assert slot is not None
            slot = entry(slot, token, path)
            written.append(slot)
            position = chunk.start + offset
            self.slots[chunk.pages[position // PAGE]][position % PAGE] = slot
        self.num_computed += chunk.num_tokens
        num_valid = len(chunk.tokens)
        if chunk.samples:
            accepted = self._verify(chunk.sequence, written[len(chunk.tokens) - 1 :], drafts, wanted)
            results[chunk.sequence] = accepted
            num_valid += len(accepted.tokens) - 1
            for fork in chunk.forks:
                results[fork] = self._verify(fork, written[-1:], [], wanted)
        self._next[chunk.sequence] = chunk.start + num_valid
        self._seen[chunk.sequence] = [*before, *written[:num_valid]]

    def _check_paths(self, slots: Sequence[Slot | None], num_prompt: int) -> None:
        if self.config.deterministic:
            paths = [slot[0] for slot in slots if slot is not None]
            assert paths == ["prompt"] * min(num_prompt, len(slots)) + ["decode"] * (len(slots) - num_prompt)

    def _verify(self, number: int, slots: Sequence[Slot], drafts: Sequence[int], wanted: int) -> Sampled:
        """Accept drafts as long as they are what would have been sampled, then draft anew, sometimes wrongly."""
        sequence = self.scheduler.sequences[number]
        seed = sequence.request.params.seed or 0
        tokens: list[int] = []
        for index, slot in enumerate(slots):
            tokens.append(sample(slot, seed, sequence.index, self.config.deterministic))
            if index == len(drafts) or drafts[index] != tokens[-1]:
                break
        slot = slots[len(tokens) - 1]
        guesses: list[int] = []
        token = tokens[-1]
        for guess in range(wanted):
            slot = entry(slot, token, "decode")
            token = sample(slot, seed, sequence.index, self.config.deterministic) + (hash((slot[1], guess)) % 3 == 0)
            guesses.append(token)
        self.drafts[number] = guesses
        return Sampled(tuple(tokens), len(guesses))

    def _take(self, progress: Progress) -> None:
        key = progress.request_id, progress.index
        assert key not in self.ends, "it had ended"
        self.outputs[key] += progress.new_tokens
        if progress.finish_reason is not None:
            self.ends[key] = progress
            self.steps_to_end[progress.request_id] = self.steps
            held = self.scheduler.sequences.get(progress.sequence)
            assert (held is not None) == (progress.finish_reason == "prefilled")
            assert held is None or held.status is Status.HELD
