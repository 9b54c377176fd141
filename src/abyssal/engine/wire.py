"""What the server's front and the engine's process say to each other: msgpack over a socket, free of torch.

The front sends :data:`Command`, the engine :data:`Report`.  A message is one of these records, tagged by its name.  A
step's news are one message, so that what a step costs the engine does not grow with the number of clients that read.
"""

from __future__ import annotations

import msgspec

from abyssal.engine.messages import FinishReason, Request, TokenLogprobs


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue a request.  Its number is the front's, never used twice; its deadline is of this machine's monotonic
    clock."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End requests with what they have; numbers that have ended are passed over."""

    request_ids: tuple[int, ...]


class Record(msgspec.Struct, frozen=True, tag=True):
    """Record the next steps for a trace; :class:`Recorded` answers when there were as many, or ``seconds`` are over."""

    steps: int
    seconds: float


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Write what is to be kept on disk, and end."""


Command = Add | Cancel | Record | Stop


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; what the front has to know of it."""

    max_length: int
    """Tokens of prompt and output together."""
    vocab_size: int
    ends: tuple[int, ...]
    """Tokens that end an output."""
    fingerprint: str
    """Names weights and configuration; short."""
    num_drafts: int
    expert_layers: tuple[int, ...] = ()
    """Layers with experts, by number: the rows of :attr:`Statistics.expert_loads`."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start: what is wrong, and what to do, in one sentence."""

    message: str


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What is new of one completion."""

    request_id: int
    index: int = 0
    """Which completion; best first where ``best_of`` ranks them, and then only at the end."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token of ``token_ids``, where asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With a completion's first delta, where asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that came from a cache so far."""
    discarded_tokens: int = 0
    """Output tokens of completions that ``best_of`` left out, with the last delta of the first completion."""
    error: str = ""
    """Why the request failed, or was refused before it began (``refused``)."""
    refused: bool = False
    """The request itself is at fault: its parameters cannot be met."""
    began: float | None = None
    """When its first step began, by this machine's monotonic clock: with a completion's first delta."""


class Statistics(msgspec.Struct, frozen=True, tag=True):
    """How the engine stands; numbers without another word count from the start of its process."""

    running: int = 0
    """Sequences that hold pages, now."""
    waiting: int = 0
    """Sequences in the queue, now."""
    used_pages: int = 0
    """Pages that running sequences hold, now; those kept for later hits alone count as free."""
    total_pages: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    """Spent in steps."""
    prompt_tokens: int = 0
    """Of prompts whose first token was sampled, cached ones included."""
    memory_hit_tokens: int = 0
    """Of those, found in memory."""
    disk_hit_tokens: int = 0
    """Of those, read from disk."""
    output_tokens: int = 0
    drafted: tuple[int, ...] = ()
    """Drafts verified, by position."""
    accepted: tuple[int, ...] = ()
    expert_loads: tuple[tuple[float, ...], ...] = ()
    """Of each layer with experts, the share of recent tokens' choices that each expert got: a decaying mean, whose
    rows add up to 1.  Empty before any, or without experts."""
    disk_bytes: int = 0
    """Of the context cache on disk, all models together, as last looked at."""


class News(msgspec.Struct, frozen=True, tag=True):
    """What a step changed."""

    deltas: tuple[Delta, ...]


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """A trace in Chrome's JSON format, which Perfetto opens."""

    trace: bytes


Report = Ready | Failed | News | Statistics | Recorded
