"""What callers see of a request: its output at the end, and as it grows.

A step tells of every request that it changed, and most callers wait for the ends alone.  So the output of a request
that goes on is put together only when somebody looks at it: copying tokens and text at every step would cost more the
longer they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import CompletionOutput, RequestOutput, TokenLogprobs


class GrowingOutput(RequestOutput):
    """The output of a request that goes on, as it stands when it is first looked at.

    Look before the next step, or take :meth:`snapshot`.
    """

    def __init__(self, completions: Sequence[LiveSequence]) -> None:
        request = completions[0].request
        vars(self).update(completions=completions, request_id=request.request_id, prompt_ids=request.prompt_ids)

    @cached_property
    def outputs(self) -> tuple[CompletionOutput, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(live.output() for live in self.completions)

    @cached_property
    def prompt_logprobs(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[TokenLogprobs | None, ...] | None:
        return _prompt_logprobs(self.completions)

    @property
    def finished(self) -> bool:
        return False

    def snapshot(self) -> RequestOutput:
        """A record of its own, which no later step changes."""
        return RequestOutput(self.request_id, self.prompt_ids, self.outputs, prompt_logprobs=self.prompt_logprobs)

    completions: Sequence[LiveSequence]
    """As the engine has them, for whoever tells of what is new alone."""


def output_of(completions: Sequence[LiveSequence]) -> RequestOutput:
    """Of a request, given all of its completions; finished when each of them is."""
    if any(live.finish_reason is None for live in completions):
        return GrowingOutput(completions)
    request = completions[0].request
    best, discarded = completions, []
    if request.params.best_of is not None:
        ranked = sorted(completions, key=_mean_logprob, reverse=True)
        best, discarded = ranked[: request.params.n], ranked[request.params.n :]
    return RequestOutput(
        request.request_id,
        request.prompt_ids,
        tuple(replace(live.output(), index=index) for index, live in enumerate(best)),
        prompt_logprobs=_prompt_logprobs(completions),
        error=next((live.error for live in completions if live.finish_reason == "error"), None),
        discarded_tokens=sum(len(live.tokens) - live.num_prompt for live in discarded),
    )


def _prompt_logprobs(completions: Sequence[LiveSequence]) -> tuple[TokenLogprobs | None, ...] | None:
    first = completions[0]
    return tuple(first.prompt_logprobs) if first.request.params.prompt_logprobs is not None else None


def _mean_logprob(live: LiveSequence) -> float:
    return live.total_logprob / max(1, len(live.tokens) - live.num_prompt)
