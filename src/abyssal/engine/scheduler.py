"""Which tokens each step computes: continuous batching over a paged cache.

The policy (:meth:`Scheduler.plan` and the three methods after it, one screen):

1. Higher priorities first; a lower one runs on what they leave.
2. Inside a priority, sequences that are writing come first, oldest first, one token each, and drafts as far as half the
   budget goes.  The rest of the budget goes to prompts, in chunks, mixed into the same step: each chunk to the user
   served least (:mod:`abyssal.engine.fairness`), whether the prompt has begun or still waits.
3. A waiting sequence begins when its pages can be had, and one more for each that runs.  Who does not fit is waited
   for; nobody of its priority or lower passes it.
4. Output that needs a page when none is left takes it from the lowest priority's youngest sequence that is not in the
   step yet: that one is preempted, to be computed again or, by choice, copied out and back.  The oldest of the highest
   priority is never preempted, so something always ends.

Who is served next follows need; who keeps memory follows age.  Were both fair, two users would preempt each other for
ever.

Time, pages and the runner are handed in, and everything here is a function of the calls made: the planner drives the
same object with a simulated clock.  One plan is under way at a time.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from abyssal.cache.pages import PagePool
from abyssal.cache.prefix import PrefixCache
from abyssal.engine.deadlines import Deadlines
from abyssal.engine.fairness import FairShares, WaitingQueue
from abyssal.engine.limits import SchedulerConfig, check_request, token_limit
from abyssal.engine.lookahead import NextEvent, uneventful_steps
from abyssal.engine.memory import SequenceMemory, StoredPrefixes
from abyssal.engine.messages import (
    Chunk,
    FinishedPrefix,
    FinishReason,
    Path,
    Progress,
    Request,
    Sampled,
    StepPlan,
    Transfer,
)
from abyssal.engine.request import Sequence, Status, Totals, pages_for


@dataclass
class _Step:
    """A plan in the making."""

    left: int
    """Tokens of the budget."""
    drafts_left: int
    most_drafts: int
    """Of one sequence."""
    chunks: list[Chunk] = field(default_factory=list)
    exports: list[Transfer] = field(default_factory=list)
    imports: list[Transfer] = field(default_factory=list)
    admitting: bool = True


class Scheduler:
    """Requests in, step plans out.

    Args:
        pool: where pages come from.
        prefix, stored: who may have them already, in memory and on disk; None: nobody.
        clock: seconds, for deadlines; a simulator hands in its own.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        prefix: PrefixCache | None = None,
        clock: Callable[[], float] = time.monotonic,
        stored: StoredPrefixes | None = None,
    ) -> None:
        self.config = config
        self.sequences: dict[int, Sequence] = {}
        """All that have not ended or whose pages are held, by number."""
        self._clock = clock
        self._memory = SequenceMemory(pool, prefix, stored, config.deterministic, config.draft_layers)
        self._shares = FairShares(credit=4.0 * config.token_budget)
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # with those importing, oldest first
        self._progress: list[Progress] = []
        self._plan: StepPlan | None = None
        self._numbers = 0
        self._requests: dict[int, list[Sequence]] = {}
        self._deadlines = Deadlines(self._lives)
        self.num_preemptions = 0
        self.totals = Totals()

    # The policy

    def plan(self, most_drafts: int | None = None) -> StepPlan:
        """The next step; its chunks may be none.  :meth:`update` is to follow before the next plan.

        Args:
            most_drafts: of a sequence, to verify in this step and to make for the next; None: those of the
                configuration.  Who measures whether drafts pay hands in 0 when they do not.
        """
        assert self._plan is None, "the last plan's results are missing: call update()"
        self._memory.copies = []
        self._end_expired()
        most_drafts = self.config.num_drafts if most_drafts is None else min(most_drafts, self.config.num_drafts)
        step = _Step(self.config.token_budget, self.config.token_budget // 2, most_drafts)
        for priority in self._priorities():
            self._plan_writing(step, [s for s in self._running if s.decoding and s.request.priority == priority])
            while step.left and (sequence := self._next_reading(step, priority)) is not None:
                if sequence.status is Status.WAITING and not self._admit(step, sequence):
                    step.admitting = False
                elif sequence.status is Status.RUNNING:
                    num_known = sequence.next_tokens(step.left, self.config.deterministic)
                    self._add_chunk(step, sequence, num_known, num_drafts=0)
        self._shares.tick()
        self._memory.finished = []  # their pages may be written in this very step
        self._plan = StepPlan(
            tuple(step.chunks), tuple(self._memory.copies), tuple(step.exports), tuple(step.imports), most_drafts
        )
        return self._plan

    def _plan_writing(self, step: _Step, writing: list[Sequence]) -> None:
        """One token, and drafts, for each sequence that is writing and can have the pages."""
        for index, sequence in enumerate(writing):
            if sequence.status is not Status.RUNNING:  # preempted for an older one
                continue
            if not step.left:
                break
            spare = max(0, step.left - (len(writing) - index))  # the others get their token before drafts
            room = sequence.limit - len(sequence.tokens) - 1
            num_drafts = max(0, min(sequence.num_drafts, step.most_drafts, spare, step.drafts_left, room))
            stop = sequence.computed + 1
            if num_drafts and not self._memory.grow(sequence, stop + num_drafts):
                num_drafts = 0  # drafts preempt nobody
            while not self._memory.grow(sequence, stop):
                victim = self._victim(sequence)
                self._preempt(step, victim or sequence)
                if victim is None:
                    break
            else:
                self._add_chunk(step, sequence, 1, num_drafts)

    def _next_reading(self, step: _Step, priority: int) -> Sequence | None:
        """The sequence whose prompt (or replay) goes next: of the user served least, the oldest."""
        reading = [s for s in self._running if s.is_idle and s.request.priority == priority]
        if step.admitting and (head := self._waiting.first(priority, self._shares)) is not None:
            reading.append(head)
        return min(reading, key=lambda s: (self._shares.served(s.request.user), s.number), default=None)

    def _admit(self, step: _Step, sequence: Sequence) -> bool:
        """Let a waiting sequence begin, if need be in the place of younger ones of lower priority."""
        while not (self._has_slots(sequence) and self._memory.admit(sequence, self._spare_pages())):
            lower = [s for s in self._running if s.is_idle and s.request.priority < sequence.request.priority]
            pages = self._memory.available + sum(len(s.pages) for s in lower)
            if not lower or pages < pages_for(len(sequence.tokens)):
                return False
            self._preempt(step, max(lower, key=lambda s: s.expendable))
        self._begin(step, sequence)
        return True

    # What the policy is made of

    def _priorities(self) -> list[int]:
        return sorted({s.request.priority for s in self._running} | self._waiting.priorities(), reverse=True)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Whose pages a writing sequence may take."""
        younger = [s for s in self._running if s.is_idle and s.expendable > sequence.expendable]
        return max(younger, key=lambda s: s.expendable, default=None)

    def _has_slots(self, sequence: Sequence) -> bool:
        return sum(s.num_slots for s in self._running) + sequence.num_slots <= self.config.max_sequences

    def _spare_pages(self) -> int:
        """So that who runs already can go on for a while: an empty engine takes whatever fits."""
        return sum(s.num_slots for s in self._running)

    def _add_chunk(self, step: _Step, sequence: Sequence, num_known: int, num_drafts: int) -> None:
        chunk = sequence.next_chunk(num_known, num_drafts, self.config.deterministic)
        step.chunks.append(chunk)
        step.left -= chunk.num_tokens
        step.drafts_left -= num_drafts
        sequence.in_flight = True
        self._charge(sequence, chunk.start + num_known)

    def _charge(self, sequence: Sequence, stop: int) -> None:
        """Count tokens before ``stop`` for its user, each once however often it is computed."""
        num_new = max(0, stop - sequence.charged)
        of_prompt = max(0, min(stop, sequence.num_prompt) - sequence.charged)
        self._shares.charge(sequence.request.user, of_prompt + self.config.output_cost * (num_new - of_prompt))
        sequence.charged = max(sequence.charged, stop)

    def _begin(self, step: _Step, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=lambda s: s.number)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.remembered = min(sequence.published, sequence.num_prompt)
        sequence.charged = max(sequence.charged, sequence.computed)
        sequence.transfer = self._memory.incoming(sequence)
        sequence.status = Status.RUNNING if sequence.transfer is None else Status.IMPORTING
        if sequence.transfer is not None:
            step.imports.append(sequence.transfer)

    def _preempt(self, step: _Step, sequence: Sequence) -> None:
        """Take a sequence's pages: it waits again, at its old place."""
        assert sequence.is_idle, sequence.number
        if self.config.preemption == "offload" and sequence.computed:
            pages = tuple(sequence.pages[: pages_for(sequence.computed)])
            step.exports.append(Transfer(sequence.number, "offload", 0, sequence.computed, pages))
            sequence.offloaded = sequence.computed
        else:
            self._memory.publish(sequence)  # what nobody needs at once is found again
        self._back_to_waiting(sequence)
        self.num_preemptions += 1
        step.admitting = False  # memory is short: let who runs go on

    def _back_to_waiting(self, sequence: Sequence) -> None:
        self._memory.release(sequence)
        sequence.forget()
        self._running.remove(sequence)
        sequence.status = Status.WAITING
        self._waiting.add(sequence)

    # Requests

    def add(self, request: Request) -> range:
        """Queue a request; the numbers of its sequences, one a completion.

        Raises:
            ValueError: it can never run as it stands; the message names the field, its value and what would do.
        """
        num_pages = self._memory.pool.num_pages
        check_request(request, self.config, num_pages, self._requests)
        count, limit = request.params.num_samples, token_limit(request, self.config, num_pages)
        tokens = [*request.prompt_ids, *request.output_ids]
        sequences = [
            Sequence(self._numbers + index, request, index, limit, list(tokens), Status.FORKING)
            for index in range(count)
        ]
        self._numbers += count
        first = sequences[0]
        first.status, first.forks, first.to_import = Status.WAITING, tuple(sequences[1:]), request.imported_tokens
        self._waiting.add(first)
        self._requests[request.request_id] = sequences
        for sequence in sequences:
            self.sequences[sequence.number] = sequence
            self._shares.enter(request.user)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, request.request_id)
        return range(first.number, self._numbers)

    def cancel(self, request_id: int, reason: FinishReason = "cancelled", detail: str = "") -> bool:
        """End a request, now or as soon as the step that it is in is back; False where there is none.

        What it has sampled stands, and pages held for export stay.  Its end is told by :meth:`update` or
        :meth:`take_progress`.
        """
        sequences = [s for s in self._requests.get(request_id, ()) if s.status is not Status.HELD]
        for sequence in sequences:
            if sequence.in_flight or sequence.status is Status.IMPORTING:
                sequence.ending = sequence.ending or (reason, detail)
            else:
                self._end(sequence, reason, detail)
        return bool(sequences)

    def imported(self, number: int, num_tokens: int | None = None, path: Path = "prompt", num_drafts: int = 0) -> None:
        """The pages of an import are filled, with ``num_tokens`` of its tokens (None: all; the rest is computed), all
        of which, and all before them, were computed by ``path``.  What a preemption took out keeps its own.

        Args:
            num_drafts: that the runner now holds for the sequence's next step, if all its tokens came.
        """
        sequence = self.sequences[number]
        transfer = sequence.transfer
        assert sequence.status is Status.IMPORTING and transfer is not None, sequence.number
        num_tokens = transfer.num_tokens if num_tokens is None else num_tokens
        assert 0 <= num_tokens <= transfer.num_tokens, (num_tokens, transfer)
        self._memory.arrived(sequence, transfer, num_tokens, path)
        sequence.status, sequence.transfer = Status.RUNNING, None
        sequence.num_drafts = num_drafts if num_tokens == transfer.num_tokens else 0
        sequence.charged = max(sequence.charged, sequence.computed)
        if transfer.kind == "stored":
            found = min(transfer.start + num_tokens, sequence.num_prompt)
            sequence.cached_tokens = max(sequence.cached_tokens or 0, found if num_tokens else 0)
        if sequence.ending is not None:
            self._end(sequence, *sequence.ending)

    def export(self, number: int) -> Transfer:
        """The pages of a sequence that ended after its prompt.  They stay until :meth:`release`."""
        sequence = self.sequences[number]
        assert sequence.status is Status.HELD, sequence.status
        pages = tuple(sequence.pages[: pages_for(sequence.computed)])
        return Transfer(number, "remote", 0, sequence.computed, pages)

    def release(self, number: int) -> None:
        """The pages of a sequence that ended after its prompt are no longer needed."""
        sequence = self.sequences[number]
        assert sequence.status is Status.HELD, sequence.status
        self._memory.release(sequence)
        self._remove(sequence)

    def drop_pages(self) -> None:
        """All entries are void (other weights, or memory given up): who runs computes everything again, and what was
        held for export is let go."""
        assert self._plan is None and not any(s.status is Status.IMPORTING for s in self._running)
        for sequence in list(self._running):
            self._back_to_waiting(sequence)
        for sequence in [s for s in self.sequences.values() if s.status is Status.HELD]:
            self.release(sequence.number)
        for sequence in self.sequences.values():
            sequence.offloaded, sequence.to_import, sequence.stored = 0, 0, None
            if sequence.num_output == len(sequence.request.output_ids):
                sequence.scored = 0  # what is said of a prompt comes from one computation
        self._memory.finished = []
        if self._memory.prefix is not None:
            self._memory.prefix.clear()

    # Results

    def update(self, plan: StepPlan, results: Mapping[int, Sampled]) -> list[Progress]:
        """Take in what a step sampled: one result for each sequence that a chunk samples for, forks included.

        Returns:
            Progress since the last call, in the order of the plan, with the ends that happened outside of steps.
        """
        assert plan is self._plan, "not the plan under way"
        self._plan = None
        for chunk in plan.chunks:
            self._take(self.sequences[chunk.sequence], chunk, results)
        return self.take_progress()

    def take_progress(self) -> list[Progress]:
        """Ends since the last call."""
        progress, self._progress = self._progress, []
        return progress

    def expire(self) -> list[Progress]:
        """Progress of a time in which no step can run: deadlines that have passed, requests cancelled."""
        self._end_expired()
        return self.take_progress()

    def take_prefixes(self) -> list[FinishedPrefix]:
        """Full pages completed by the last update, to be kept on disk; to be read before the next plan."""
        finished, self._memory.finished = self._memory.finished, []
        return finished

    def _take(self, sequence: Sequence, chunk: Chunk, results: Mapping[int, Sampled]) -> None:
        sequence.in_flight = False
        num_known = len(chunk.tokens)
        if sequence.ending is not None or not chunk.samples:
            sequence.computed_chunk(chunk, num_known)
            if sequence.ending is not None:
                self._end(sequence, *sequence.ending)
            else:
                self._publish_long(sequence)
            return
        sampled = results[sequence.number]
        assert len(sampled.tokens) in range(0 if sampled.error else 1, chunk.num_drafts + 2), (chunk, sampled)
        sequence.computed_chunk(chunk, num_known + max(0, len(sampled.tokens) - 1))
        forks, sequence.forks = sequence.forks, ()
        for fork in forks:
            self._memory.fork(sequence, fork)
            fork.status = Status.RUNNING
            insort(self._running, fork, key=lambda s: s.number)
        for each in (sequence, *forks):
            self._accept(each, results[each.number])

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        """Append new tokens, as far as nothing ends the sequence."""
        first, reason = sequence.num_output == 0, None
        before = len(sequence.tokens)
        for token in sampled.tokens:
            sequence.tokens.append(token)
            if (reason := self._reason(sequence, token)) is not None:
                break
        if len(sequence.tokens) == before + len(sampled.tokens):
            reason = "error" if sampled.error else "stop" if sampled.stopped else reason
        if reason is None and sequence.request.prefill_only:
            reason = "prefilled"
        new_tokens = tuple(sequence.tokens[before:])
        self.totals.count(sequence, len(new_tokens))
        if reason is not None:
            self._end(sequence, reason, sampled.error, new_tokens)
            return
        self._progress.append(sequence.progress(new_tokens))
        sequence.num_drafts = sampled.num_drafts
        if first:
            self._memory.publish(sequence)
        self._publish_long(sequence)

    def _reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        ends = token in params.stop_token_ids or (not params.ignore_eos and token in self.config.end_token_ids)
        if ends and sequence.num_output > params.min_tokens:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def _publish_long(self, sequence: Sequence) -> None:
        if sequence.computed - sequence.published >= self.config.save_every:
            self._memory.publish(sequence)

    def _end(
        self, sequence: Sequence, reason: FinishReason, detail: str = "", new_tokens: tuple[int, ...] = ()
    ) -> None:
        self._progress.append(sequence.progress(new_tokens, reason, detail))
        self._shares.leave(sequence.request.user)
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            if reason != "error":
                self._memory.publish(sequence)
            if reason == "prefilled":
                sequence.status = Status.HELD
                return
            self._memory.release(sequence)
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        sequence.status = Status.ENDED
        del self.sequences[sequence.number]
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        for sibling in siblings:  # the one that computes the prompt no longer waits for this one
            sibling.forks = tuple(fork for fork in sibling.forks if fork is not sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]

    def _end_expired(self) -> None:
        for request_id in self._deadlines.take_expired(self._clock()):
            self.cancel(request_id, "deadline")

    def _lives(self, deadline: float, request_id: int) -> bool:
        """Whether a request of this number and deadline is under way."""
        return any(s.request.deadline == deadline for s in self._requests.get(request_id, ()))

    # For simulators and tests

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no pages; the forks of a prompt not yet computed are not counted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages and go on."""
        return len(self._running)

    @property
    def num_writing(self) -> int:
        """Sequences whose next step computes their newest token."""
        return sum(sequence.decoding for sequence in self._running)

    @property
    def unfinished(self) -> bool:
        """Whether anything is under way.  Pages held for export are not."""
        return bool(self._waiting or self._running)

    def next_event(self) -> NextEvent | None:
        """Until when plans stay alike; None when nothing is under way."""
        if not self.unfinished:
            return None
        alike = self._plan is None and all(self._memory.owns_next(s) and not s.num_drafts for s in self._running)
        if self._waiting:  # full, and nobody waits who would displace a running one
            full = sum(s.num_slots for s in self._running) >= self.config.max_sequences
            lowest = min((s.request.priority for s in self._running), default=0)
            alike = alike and full and max(self._waiting.priorities()) <= lowest
        steps = uneventful_steps(self._running, self._memory.pool.free) if alike else 0
        return NextEvent(steps, self._deadlines.first())

    def skip(self, steps: int, token: int = 0) -> None:
        """Do as if ``steps`` plans had run, at most those of :meth:`next_event`, each sampling ``token``, which ends
        nothing.  The outcome is the same but for the numbers of pages."""
        event = self.next_event()
        assert event is not None and 0 <= steps <= event.steps, (steps, event)
        for sequence in self._running:
            grown = self._memory.grow(sequence, sequence.computed + steps)
            assert grown, sequence.number
        for _ in range(steps):
            for sequence in self._running:
                sequence.tokens.append(token)
                sequence.computed += 1
                self._charge(sequence, sequence.computed)
            self._shares.tick()
        for sequence in self._running:
            assert self._reason(sequence, token) is None, "the token ends a sequence"
            self._publish_long(sequence)
        self._memory.finished = []

    def check(self) -> None:
        """Assert that pages and sequences account for each other exactly."""
        self._memory.check(self.sequences.values())
        for sequence in self.sequences.values():
            assert (sequence in self._running) == (sequence.status in (Status.IMPORTING, Status.RUNNING))
        assert sum(s.num_slots for s in self._running) <= self.config.max_sequences
