"""What crosses the engine's borders: requests in, step plans to the runner, what it sampled, and outputs.

Plain records, free of torch, so that the server (another process), the planner's simulator and the tests hold the same
objects.  A step is data: the scheduler writes a :class:`StepPlan`, a runner carries it out, real or simulated, and
answers with one :class:`Sampled` for each sequence that was to be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error", "prefilled"]
"""Why a sequence ended.  ``prefilled``: it was to end after its prompt; its pages wait to be exported."""

Path = Literal["prompt", "decode"]
"""By which form of attention a token is computed: expanded (``prompt``) or absorbed (``decode``)."""

MOST_SAMPLES = 128
"""Largest ``n`` or ``best_of`` of one request."""
MOST_LOGPROBS = 1024
"""Largest number of alternatives whose log-probabilities may be asked for at one position."""


@dataclass(frozen=True)
class StructuredOutput:
    """A form that the output must have."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    """Which language ``value`` is written in."""
    value: Any
    """A JSON schema (mapping or text), a regular expression, a sequence of texts, or a grammar in Lark's syntax."""

    def __post_init__(self) -> None:
        kinds = ("json_schema", "regex", "choice", "grammar")
        if self.kind not in kinds:
            raise ValueError(f"structured.kind: {self.kind!r} must be one of {', '.join(kinds)}")
        if not self.value and not (self.kind == "json_schema" and self.value == {}):
            raise ValueError(f"structured.value: {self.value!r} describes no {self.kind}; give one, or structured=None")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a request ends."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides (negative: multiplies) the logit of each token that prompt or output holds already."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the output holds already."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time the output holds it."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Of this request's random numbers; without one, the engine gives each request its own."""
    max_tokens: int | None = 128
    """New tokens at most; None: up to the model's length."""
    min_tokens: int = 0
    """End tokens and stop tokens are not sampled before this many new tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, besides the model's own end tokens."""
    include_stop: bool = False
    """Leave the stop text in the output."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    n: int = 1
    """Completions to return."""
    best_of: int | None = None
    """Completions to make; the ``n`` of highest mean log-probability are returned.  By default ``n``."""
    logprobs: int | None = None
    """Log-probabilities of each output token and of this many likeliest alternatives."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first.  The prompt is then computed whole, past any cache."""
    echo: bool = False
    """Put the prompt's text before the output's, where prompts are text or there is a tokenizer; its tokens and
    log-probabilities are the output's own field either way."""
    structured: StructuredOutput | None = None
    """A form that the output must have."""
    return_experts: bool = False
    """Return the routed experts of each token and layer.  The prompt is then computed whole, past any cache."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_ranges()
        self._check_counts()
        self._check_together()

    @property
    def num_samples(self) -> int:
        """Completions to make."""
        return self.n if self.best_of is None else self.best_of

    @property
    def whole_prompt(self) -> bool:
        """Whether each prompt token has to pass through the model, because something is returned about it."""
        return self.prompt_logprobs is not None or self.return_experts

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalties or bool(self.logit_bias)

    def _check_ranges(self) -> None:
        _between("temperature", self.temperature, 0.0, 100.0, "0 is greedy")
        _between("min_p", self.min_p, 0.0, 1.0, "0 keeps all")
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 is none")
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 is none")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p} must lie in (0, 1] (1 keeps the whole vocabulary)")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise ValueError(f"repetition_penalty: {self.repetition_penalty} must lie in (0, 100] (1 is none)")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or token < 0:
                raise ValueError(f"logit_bias: key {token!r} must be a token id, an integer of 0 or more")
            _between(f"logit_bias[{token}]", bias, -100.0, 100.0, "-100 all but forbids the token")

    def _check_counts(self) -> None:
        _at_least("top_k", self.top_k, 0, "0 keeps all")
        _at_least("min_tokens", self.min_tokens, 0, "0 is none")
        _at_least("n", self.n, 1, "completions to return")
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1, "None goes up to the model's length")
        for name in ("n", "best_of"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value <= MOST_SAMPLES):
                raise ValueError(f"{name}: {value} must be at most {MOST_SAMPLES}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 0 <= value <= MOST_LOGPROBS):
                raise ValueError(f"{name}: {value} must be a whole number in 0..{MOST_LOGPROBS}, or None")
        for token in self.stop_token_ids:
            _at_least("stop_token_ids", token, 0, "each is a token id")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: {text!r} must be a text of at least one character")

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: {self.best_of} completions are fewer than the n = {self.n} to return; raise it")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens} is above max_tokens {self.max_tokens}; lower it")
        if self.temperature == 0.0 and self.num_samples > 1:
            name, value = ("n", self.n) if self.best_of is None else ("best_of", self.best_of)
            raise ValueError(f"{name}: {value} completions at temperature 0 are all the same; raise temperature")


def _between(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}: {value} must lie in {low:g}..{high:g} ({hint})")


def _at_least(name: str, value: int, low: int, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: {value} must be a whole number of at least {low} ({hint})")


@dataclass(frozen=True)
class Request:
    """What is asked of the engine."""

    request_id: int
    """The caller's number for it; no two live requests share one."""
    prompt_ids: tuple[int, ...]
    """Tokens of the prompt, at least one."""
    params: SamplingParams = field(default_factory=SamplingParams)
    user: str = ""
    """Between whom service is shared fairly."""
    namespace: str = ""
    """Cached pages are shared inside a namespace only."""
    priority: int = 0
    """Higher ones run first; a lower one runs on what they leave."""
    deadline: float | None = None
    """On the scheduler's clock: not finished by then, it ends with what it has."""
    prefill_only: bool = False
    """End after the prompt's first token was sampled, and keep the pages to be exported."""
    output_ids: tuple[int, ...] = ()
    """Tokens sampled elsewhere already (by a prefill unit)."""
    imported_tokens: int = 0
    """Leading tokens whose pages another engine exports to this one: all of ``prompt_ids`` and ``output_ids`` but the
    last, or 0."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive new tokens of one sequence in a step."""

    sequence: int
    """Number of the running sequence (not of its request, which may have several)."""
    start: int
    """Position of the first token computed."""
    num_tokens: int
    pages: tuple[int, ...]
    """Pages that hold positions 0 .. start + num_tokens, in order."""
    tokens: tuple[int, ...]
    """The tokens themselves, without the drafts, which the runner holds: ``num_tokens - num_drafts`` of them."""
    path: Path
    """By which form of attention."""
    next_token: int | None = None
    """The known token after the last, on which an MTP layer's entry of the last depends; None: it is to be sampled."""
    samples: bool = False
    """Whether a token is to be sampled: logits of the last token (with drafts: of the last ``num_drafts + 1``)."""
    scores: bool = False
    """Whether log-probabilities of its tokens, as a prompt, are wanted: logits of each."""
    num_drafts: int = 0
    """Of its tokens, how many at its end are drafts to be verified."""
    forks: tuple[int, ...] = ()
    """Further sequences (n > 1) that sample their first token from the same logits; each answers for itself."""

    def __post_init__(self) -> None:
        assert self.num_tokens == len(self.tokens) + self.num_drafts, self
        assert self.tokens and self.start >= 0, self

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Transfer:
    """Pages of a sequence that leave the pool's memory or come back to it."""

    sequence: int
    kind: Literal["offload", "stored", "remote"]
    """``offload``: a preempted sequence, out and later in; ``stored``: pages of its prefix that the disk holds, in;
    ``remote``: between engines."""
    start: int
    """Position of the first token, at the beginning of a page."""
    num_tokens: int
    """The last page may hold fewer than a page of tokens."""
    pages: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """One step of the model.  A runner does, in this order: exports, copies, imports, chunks."""

    chunks: tuple[Chunk, ...] = ()
    """May be empty: a rank without requests still joins its group's step."""
    copies: tuple[tuple[int, int], ...] = ()
    """(from, to): pages copied before the step, because several sequences would write them."""
    exports: tuple[Transfer, ...] = ()
    """Pages to be copied out; others may own them from here on."""
    imports: tuple[Transfer, ...] = ()
    """Pages to be filled.  None of this step's chunks needs them; ``Scheduler.imported`` says when they are there."""
    wanted_drafts: int = 0
    """Drafts to be made after the step for each sequence that goes on; its next step may verify them."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    def split(self) -> tuple[StepPlan, StepPlan]:
        """Two micro-batches of whole chunks, near in tokens: largest chunk first, each to the lighter half, in the
        plan's order inside a half.  What comes before the step (copies, transfers) stays with the first."""
        halves: tuple[list[int], list[int]] = ([], [])
        weights = [0, 0]
        for index in sorted(range(len(self.chunks)), key=lambda i: (-self.chunks[i].num_tokens, i)):
            half = int(weights[1] < weights[0])
            halves[half].append(index)
            weights[half] += self.chunks[index].num_tokens
        first, second = (tuple(self.chunks[index] for index in sorted(half)) for half in halves)
        wanted = self.wanted_drafts
        before = StepPlan(first, self.copies, self.exports, self.imports, wanted)
        return before, StepPlan(second, wanted_drafts=wanted)


@dataclass(frozen=True)
class Sampled:
    """A runner's answer for one sequence."""

    tokens: tuple[int, ...]
    """New tokens in order: one, or the accepted drafts and one more."""
    num_drafts: int = 0
    """Drafts that the runner now holds for the sequence's next step."""
    stopped: bool = False
    """A stop text ended the output with the last of these tokens."""
    error: str = ""
    """Why the sequence cannot go on (its grammar allows no token, its logits are not numbers): one sentence."""


@dataclass(frozen=True)
class Progress:
    """What a step meant for one sequence."""

    sequence: int
    request_id: int
    index: int
    """Which of the request's completions."""
    new_tokens: tuple[int, ...] = ()
    """Kept: nothing follows an end token or the last token allowed."""
    finish_reason: FinishReason | None = None
    """None while it goes on."""
    cached_tokens: int = 0
    """Prompt tokens that came from a cache."""
    detail: str = ""
    """Of an ``error``: what and why, one sentence."""


@dataclass(frozen=True)
class FinishedPrefix:
    """Whole pages that were just completed and may be kept on disk; untouched until the next ``plan()``."""

    tokens: tuple[int, ...]
    """From the sequence's first token; as many as the pages hold."""
    pages: tuple[int, ...]
    num_prompt_path: int
    """Leading tokens that were computed on the prompt path, each seeing only such: a multiple of the page size."""
    namespace: str


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest, best first."""


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that came from a cache instead of being computed."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None
    """The stop text or token that ended it."""
    experts: Any = None
    """(T, L, K) logical ids of the experts that each token was routed to, best first, where asked for: T = prompt +
    output tokens - 1, since the last sampled token has not passed through the model and has no routing; L layers with
    experts, without those of MTP modules.  A position's routing is of the pass that the token after it was sampled
    from, also where preemption or new weights had it computed again later."""
    versions: tuple[tuple[int, int], ...] = ()
    """(version of the weights, output tokens in a row sampled with it), in order: one pair unless the weights were
    updated under way.  Tokens sampled elsewhere (``Request.output_ids``) are not counted."""
    began: float | None = field(default=None, compare=False)
    """When its first step began, by the engine's clock; until then it was in the queue.  None before."""

    @property
    def weights_version(self) -> int | None:
        """Of the newest token sampled; the oldest is ``versions[0][0]``.  None before any."""
        return self.versions[-1][0] if self.versions else None


@dataclass(frozen=True)
class RequestOutput:
    """A request's completions, best first."""

    request_id: int
    prompt_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt: str = ""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One a prompt token; None for the first, which nothing precedes."""
    error: str | None = None
    """Why the request was refused or failed."""
    discarded_tokens: int = 0
    """Output tokens of the completions that ``best_of`` left out."""

    @property
    def text(self) -> str:
        """Of the first completion; empty where the request failed."""
        return self.outputs[0].text if self.outputs else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first completion."""
        return self.outputs[0].token_ids if self.outputs else ()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first completion; ``error`` where the request failed."""
        return self.outputs[0].finish_reason if self.outputs else "error"

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from a cache."""
        return self.outputs[0].cached_tokens if self.outputs else 0

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of the first completion."""
        return self.outputs[0].logprobs if self.outputs else None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(output.finish_reason is not None for output in self.outputs)
