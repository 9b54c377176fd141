"""What the scheduler knows of one sequence: a request's prompt with one of its completions.

A sequence is a row of known tokens and a count of those whose cache entries are there.  Everything else follows from
the difference: what is left to compute, whether a prompt is being read or an output written, and by which path.

*Paths.*  Prompt tokens are always computed on the prompt path (expanded attention), whatever the chunking.  An output
token is computed on the decode path (absorbed attention) as it comes; when a preempted sequence computes several again,
the default is the faster prompt path, and in deterministic mode each is replayed on the decode path, because the two
differ in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from abyssal.cache.pages import PAGE
from abyssal.engine.messages import Chunk, FinishReason, Path, Progress, Request, Transfer


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """Holds no pages: new, or preempted."""
    IMPORTING = "importing"
    """Its pages are being filled from elsewhere."""
    RUNNING = "running"
    """Holds pages; may be in a step."""
    FORKING = "forking"
    """Waits for its first token from the sequence that computes the common prompt."""
    HELD = "held"
    """Ended after its prompt; its pages wait to be exported."""
    ENDED = "ended"


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE)


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one sequence; the scheduler alone writes it."""

    number: int
    """Names it in plans; in the order of arrival, so that a smaller one is older."""
    request: Request
    index: int
    """Which of the request's completions."""
    limit: int
    """Tokens at most, prompt and output."""
    tokens: list[int]
    """Prompt and output."""
    status: Status = Status.WAITING
    pages: list[int] = field(default_factory=list)
    """One reference to each is the sequence's."""
    computed: int = 0
    """Leading tokens whose entries are in the pages."""
    prompt_path: int = 0
    """Leading tokens of those that were computed on the prompt path, all before them too."""
    num_drafts: int = 0
    """Drafts that the runner holds."""
    forks: tuple[Sequence, ...] = ()
    """Sequences that wait for its prompt."""
    cached_tokens: int | None = None
    """Prompt tokens found in a cache when it was first admitted."""
    remembered: int = 0
    """Of those, found in memory; the others were read from disk."""
    stored: int | None = None
    """Tokens of its beginning that the disk had when it was first looked up."""
    offloaded: int = 0
    """Leading tokens whose entries a preemption moved out."""
    to_import: int = 0
    """Leading tokens whose entries another engine sends."""
    transfer: Transfer | None = None
    """While importing: what is on its way."""
    published: int = 0
    """Leading tokens whose pages were offered to the caches."""
    charged: int = 0
    """Leading tokens that its user has paid for: computing them again is free."""
    scored: int = 0
    """Leading prompt tokens whose logits were asked for."""
    in_flight: bool = False
    """In a step whose results are not known."""
    ending: tuple[FinishReason, str] | None = None
    """Why it ends as soon as its step is back."""
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens to compute, of which the last gives the next."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether its next step computes the newest output token alone."""
        known = len(self.tokens)
        return self.status is Status.RUNNING and known - self.computed == 1 and known > self.num_prompt

    @property
    def is_idle(self) -> bool:
        """Whether it runs and is not in the step being planned."""
        return self.status is Status.RUNNING and not self.in_flight

    @property
    def holds_pages(self) -> bool:
        return self.status in (Status.IMPORTING, Status.RUNNING, Status.HELD)

    @property
    def expendable(self) -> tuple[int, int]:
        """The greatest goes first when pages are short: of the lowest priority, the youngest."""
        return -self.request.priority, self.number

    @property
    def num_slots(self) -> int:
        """Of the sequences that may run at once, how many it takes up."""
        return 1 + len(self.forks)

    def next_path(self, deterministic: bool) -> Path:
        """By which form of attention its next tokens are computed."""
        if self.computed < self.num_prompt:
            return "prompt"
        return "decode" if deterministic or self.remaining == 1 else "prompt"

    def next_tokens(self, most: int, deterministic: bool) -> int:
        """How many tokens one chunk may take: all on one path."""
        if deterministic and self.computed < self.num_prompt:
            most = min(most, self.num_prompt - self.computed)
        return min(most, self.remaining)

    def next_chunk(self, num_known: int, num_drafts: int, deterministic: bool) -> Chunk:
        """A step's share of the sequence: ``num_known`` tokens, then drafts."""
        stop = self.computed + num_known
        samples = stop == len(self.tokens)
        scores = self.request.params.prompt_logprobs is not None and self.scored < min(stop, self.num_prompt)
        return Chunk(
            sequence=self.number,
            start=self.computed,
            num_tokens=num_known + num_drafts,
            pages=tuple(self.pages[: pages_for(stop + num_drafts)]),
            tokens=tuple(self.tokens[self.computed : stop]),
            next_token=None if samples else self.tokens[stop],
            path=self.next_path(deterministic),
            samples=samples,
            scores=scores,
            num_drafts=num_drafts,
            forks=tuple(fork.number for fork in self.forks) if samples else (),
        )

    def computed_chunk(self, chunk: Chunk, num_valid: int) -> None:
        """Account for a chunk that has run; ``num_valid`` of its tokens stand (rejected drafts do not)."""
        if chunk.path == "prompt" and self.prompt_path >= chunk.start:
            self.prompt_path = max(self.prompt_path, chunk.start + num_valid)
        self.computed = chunk.start + num_valid
        self.scored = max(self.scored, min(self.computed, self.num_prompt))

    def progress(self, new_tokens: tuple[int, ...], reason: FinishReason | None = None, detail: str = "") -> Progress:
        """What a step, or an end outside of steps, meant for it."""
        cached = self.cached_tokens or 0
        return Progress(self.number, self.request.request_id, self.index, new_tokens, reason, cached, detail)

    def forget(self) -> None:
        """Its pages are gone: everything is to be computed again, or to come back from where it was moved."""
        self.computed = self.num_drafts = self.published = 0


@dataclass(slots=True)
class Totals:
    """Tokens since the beginning, for whoever watches."""

    prompt_tokens: int = 0
    """Of prompts whose first token was sampled, once a request, cached ones included."""
    memory_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    output_tokens: int = 0

    def count(self, sequence: Sequence, num_new: int) -> None:
        """So many new tokens of a sequence stand."""
        if sequence.index == 0 and sequence.num_output == num_new > 0:
            self.prompt_tokens += sequence.num_prompt
            self.memory_hit_tokens += sequence.remembered
            self.disk_hit_tokens += (sequence.cached_tokens or 0) - sequence.remembered
        self.output_tokens += num_new
