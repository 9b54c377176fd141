"""What the API's front and the engine's client hand each other: a request made ready, and events of its completions.

Neither knows of HTTP.  A protocol turns a request's body into a :class:`Prepared`; a service runs it and yields
:class:`EngineEvent`; the protocol turns those into a body or into the chunks of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abyssal.engine.messages import FinishReason, SamplingParams, TokenLogprobs
from abyssal.serve.protocol.errors import ApiError
from abyssal.text.output_parser import OutputParser


@dataclass(frozen=True)
class ThinkTokens:
    """By which tokens an output's reasoning is told from its answer."""

    begin: int
    end: int
    open: bool
    """Whether the prompt leaves reasoning open; else the output may begin with some of its own."""


@dataclass(frozen=True)
class Prepared:
    """A request that the engine can run."""

    prompts: tuple[tuple[int, ...], ...]
    """Tokens: one engine request each, of ``params.n`` choices."""
    params: SamplingParams
    model: str
    """As the answer names it."""
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with a chunk of usage."""
    continuous_usage: bool = False
    """Whether its other chunks have the usage so far as well."""
    parse: Callable[[int], OutputParser] | None = None
    """A new parser of a choice's text, by the choice's index in the response; None for plain text."""
    think: ThinkTokens | None = None
    """None where the format has no reasoning."""
    echo_text: tuple[str, ...] | None = None
    """Of each prompt, put before its choices' text; None for no echo."""
    drop_output: bool = False
    """``max_tokens`` is 0: the one token that the engine samples is not shown and not counted."""
    user: str = ""
    """Of the caller's own users, between whom service is shared fairly."""
    priority: int = 0
    form_name: str = "structured"
    """The parameter that asked for ``params.structured``, as errors are to name it."""
    repeated: Mapping[str, Any] = field(default_factory=dict)
    """What the answer repeats of the request."""

    @property
    def num_choices(self) -> int:
        """Choices in the response, of all prompts."""
        return len(self.prompts) * self.params.n

    def choice_of(self, event: EngineEvent) -> int:
        """The choice's index in the response."""
        return event.prompt * self.params.n + event.choice


@dataclass(frozen=True)
class EngineEvent:
    """What is new of one choice.  Those of one choice come in order, and the last has a ``finish_reason``."""

    prompt: int = 0
    """Which of ``Prepared.prompts``."""
    choice: int = 0
    """Which of that prompt's completions, best first where ``best_of`` ranks them."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token of ``token_ids``, where asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With the first event of each choice, where asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop text or token that ended it."""
    cached_tokens: int = 0
    """Tokens of the prompt that came from a cache."""
    discarded_tokens: int = 0
    """Output tokens of completions that ``best_of`` left out, with the last event of a prompt's first choice."""
    error: ApiError | None = None
    """The request failed; no more events come."""
    began: float | None = field(default=None, compare=False)
    """When the engine began with it, by the monotonic clock; until then it was in the queue.  With the first event of
    each choice, where it is known."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, over all of its prompts and choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that came from a cache."""
    reasoning_tokens: int = 0
    """Of the completion's."""

    @property
    def missed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens
