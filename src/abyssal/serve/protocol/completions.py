"""``/v1/completions`` and ``/beta/completions``: text or tokens in, text out, with echo, scores and fill-in-the-middle.

A text prompt gets the model's bos token, as in training and in the offline API; a prompt of tokens is taken as it is.
With ``suffix``, prompt and suffix become the model's fill-in-the-middle prompt, ``FIM_BEGIN prompt FIM_HOLE suffix
FIM_END``.  ``echo`` with ``logprobs`` returns the prompt's log-probabilities too, which lm-eval reads, and then
``max_tokens: 0`` scores a prompt without adding to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol import logprobs as shapes
from abyssal.serve.protocol.common import (
    SamplingFields,
    Unsupported,
    check_bytes,
    check_length,
    checked_tokens,
    read,
    sampling_params,
)
from abyssal.serve.protocol.errors import bad_parameter, of_value_error
from abyssal.serve.protocol.reply import Reply, finish_reason
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.protocol.usage import usage_body
from abyssal.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE

MOST_PROMPTS = 2048
"""Prompts of one request, and completions of them all together: OpenAI's limit."""

UNSUPPORTED: Mapping[str, Unsupported] = {}
"""OpenAI's schema of text completions works whole."""


class CompletionRequest(SamplingFields):
    """OpenAI's schema, and some of vLLM's."""

    prompt: Any
    """A text, tokens, or a list of either."""
    suffix: str | None = None
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=16, ge=0)


def prepare(body: object, served: ServedModel) -> Prepared:
    """A request's body, ready to run.

    Raises:
        ApiError: what is wrong, by name.
    """
    request = read(CompletionRequest, body, UNSUPPORTED, served)
    prompts = _prompts(request, served)
    if request.best_of is not None and request.stream and request.best_of > request.n:
        raise bad_parameter("best_of", "the best are known at the end alone; set stream to false, or leave it out")
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    for prompt in prompts:
        check_length(len(prompt), max(1, max_tokens), served)
    params = sampling_params(
        request,
        served,
        max_tokens=max(1, max_tokens),
        best_of=request.best_of,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    if (most := len(prompts) * params.num_samples) > MOST_PROMPTS:
        name = "n" if request.best_of is None else "best_of"
        raise bad_parameter(name, f"{most} completions of {len(prompts)} prompts; ask for at most {MOST_PROMPTS}")
    return Prepared(
        prompts=prompts,
        params=params,
        model=request.model,
        stream=request.stream,
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        echo_text=_echo(request, prompts, served) if request.echo else None,
        drop_output=max_tokens == 0,
        user=request.user,
        priority=request.priority,
    )


def _prompts(request: CompletionRequest, served: ServedModel) -> tuple[tuple[int, ...], ...]:
    prompts = _listed(request.prompt)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise bad_parameter("prompt", f"{len(prompts)} prompts; give 1 to {MOST_PROMPTS}")
    for prompt in prompts:
        if isinstance(prompt, str):
            check_bytes(len(prompt.encode()) + len((request.suffix or "").encode()), served)
    return tuple(_ids(request, prompt, served) for prompt in prompts)


def _listed(prompt: object) -> Sequence[str | list[int]]:
    """One prompt or many, as many."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if all(isinstance(each, str) for each in prompt) or all(map(_is_tokens, prompt)):
            return prompt
        if _is_tokens(prompt):
            return [prompt]
    raise bad_parameter("prompt", "must be a text, a list of token ids, or a list of either")


def _is_tokens(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _ids(request: CompletionRequest, prompt: str | list[int], served: ServedModel) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        if request.suffix is not None:
            raise bad_parameter("suffix", "goes with a prompt of text, not of tokens")
        return checked_tokens("prompt", prompt, served.vocab_size)
    if request.suffix is not None:
        return _around(request, prompt, request.suffix, served)
    ids = served.encode(prompt)
    if not ids:
        raise bad_parameter("prompt", "is empty, and the model has no token to begin with; give some text")
    return ids


def _around(request: CompletionRequest, prefix: str, suffix: str, served: ServedModel) -> tuple[int, ...]:
    """Prefix, suffix, middle, as in training."""
    if request.echo:
        raise bad_parameter("echo", "the text stands between prompt and suffix; leave out echo or suffix")
    try:
        begin, hole, end = map(served.tokenizer.token_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
    except ValueError as error:
        raise of_value_error(ValueError(f"suffix: {error}; this model cannot fill in the middle")) from None
    before, after = served.encode_all([prefix, suffix], begin=False)
    return (*served.encode(""), begin, *before, hole, *after, end)


def _echo(request: CompletionRequest, prompts: Sequence[tuple[int, ...]], served: ServedModel) -> tuple[str, ...]:
    given = _listed(request.prompt)
    return tuple(
        text if isinstance(text, str) else served.decode(ids) for text, ids in zip(given, prompts, strict=True)
    )


@dataclass
class _Choice:
    """One choice's text so far."""

    logprobs: shapes.TextLogprobs | None
    begun: bool = False
    texts: list[str] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionReply(Reply):
    """The way back: feed it every event, and send each chunk; or feed it all, and send the body.

    ``push`` keeps texts for :meth:`body` only where the request is not a stream.
    """

    def __init__(self, prepared: Prepared, served: ServedModel, id: str, created: int) -> None:
        super().__init__(prepared, served, id, created)
        num_top = prepared.params.logprobs
        self._choices = [
            _Choice(None if num_top is None else shapes.TextLogprobs(served, num_top))
            for _ in range(prepared.num_choices)
        ]

    def push(self, event: EngineEvent) -> list[dict[str, Any]]:
        """Chunks of a stream that the event makes; none where there is nothing to show yet, or no stream.

        Raises:
            ApiError: the request failed.
        """
        self.count(event)
        index = self.prepared.choice_of(event)
        choice = self._choices[index]
        text, piece = self._shown(event, choice)
        choice.begun = True
        choice.finish_reason = self._reason(event)
        if not self.prepared.stream:
            choice.texts.append(text)
            choice.pieces += [] if piece is None else [piece]
            return []
        if not (text or piece is not None or choice.finish_reason):
            return []
        return [self._chunk([_body(index, text, piece, choice.finish_reason)])]

    def finish(self) -> list[dict[str, Any]]:
        """Chunks behind the last event."""
        if not self.prepared.include_usage:
            return []
        return [self.head.body("text_completion", choices=[], usage=usage_body(self.usage))]

    def body(self) -> dict[str, Any]:
        """The whole answer, behind the last event."""
        choices = [
            _body(index, "".join(choice.texts), self._joined(choice), choice.finish_reason)
            for index, choice in enumerate(self._choices)
        ]
        return self.head.body("text_completion", choices=choices, usage=usage_body(self.usage))

    def _reason(self, event: EngineEvent) -> str | None:
        if self.prepared.drop_output and event.finish_reason == "stop":
            return "length"
        return finish_reason(event.finish_reason)

    def _shown(self, event: EngineEvent, choice: _Choice) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities that the event adds, the prompt's first."""
        text, tokens, entries = event.text, list(event.token_ids), list(event.logprobs)
        if self.prepared.drop_output:
            text, tokens, entries = "", [], []
        known: list[TokenLogprobs | None] = [*entries]
        if not choice.begun and self.prepared.echo_text is not None:
            prompt = self.prepared.prompts[event.prompt]
            text = self.prepared.echo_text[event.prompt] + text
            tokens = [*prompt, *tokens]
            known = [*(event.prompt_logprobs or [None] * len(prompt)), *known]
        if choice.logprobs is None or not tokens:
            return text, None
        return text, choice.logprobs.piece(tokens, known)

    def _joined(self, choice: _Choice) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        return shapes.join([choice.logprobs.piece([], []), *choice.pieces])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head.body("text_completion", choices=choices, **self.chunk_usage())


def _body(index: int, text: str, piece: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": piece, "finish_reason": reason}
