"""What is new of each request since the last step: the engine's outputs as :class:`~abyssal.engine.wire.Delta`.

An output holds everything that a request has; telling it anew at each step would cost the square of its length.  So it
is remembered how far each completion was told, and a step costs what it brought.  Put together, a completion's deltas
are its output.  Completions that ``best_of`` ranks are told when the request has ended, since before that nobody knows
which of them will be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import CompletionOutput, RequestOutput, TokenLogprobs
from abyssal.engine.outputs import GrowingOutput
from abyssal.engine.wire import Delta


@dataclass(slots=True)
class _Told:
    """How far a completion was told."""

    begun: bool = False
    pieces: int = 0
    """Of text."""
    characters: int = 0
    tokens: int = 0
    logprobs: int = 0
    ended: bool = False


class DeltaTeller:
    """Tells of every request that an engine's steps changed; one for each engine."""

    def __init__(self) -> None:
        self._told: dict[int, list[_Told]] = {}

    def tell(self, outputs: Iterable[RequestOutput]) -> list[Delta]:
        """The news in what one call of :meth:`~abyssal.engine.core.Engine.step` returned; before the next."""
        deltas: list[Delta] = []
        for output in outputs:
            deltas += self._growing(output) if isinstance(output, GrowingOutput) else self._ended(output)
        return deltas

    def _growing(self, output: GrowingOutput) -> list[Delta]:
        params = output.completions[0].request.params
        if params.best_of is not None:
            return []
        told = self._told.get(output.request_id)
        if told is None:
            told = self._told[output.request_id] = [_Told() for _ in output.completions]
        scored = output.completions[0].prompt_logprobs if params.prompt_logprobs is not None else None
        found = [_news(live, each, scored) for live, each in zip(output.completions, told, strict=True)]
        return [delta for delta in found if delta is not None]

    def _ended(self, output: RequestOutput) -> list[Delta]:
        told = self._told.pop(output.request_id, None) or [_Told() for _ in output.outputs]
        pairs = zip(output.outputs, told, strict=True)
        return [_last(output, completion, each) for completion, each in pairs if not each.ended]


def _news(live: LiveSequence, told: _Told, scored: Sequence[TokenLogprobs | None] | None) -> Delta | None:
    """Of a completion whose request goes on; None without any."""
    reason, shown = live.finish_reason, live.text
    token_ids = tuple(live.tokens[live.num_prompt + told.tokens :])
    if told.ended or (not token_ids and reason is None):
        return None
    text = shown.since(told.pieces)
    logprobs = tuple(live.logprobs[told.logprobs :]) if live.logprobs else ()
    first, told.begun, told.ended = not told.begun, True, reason is not None
    told.pieces = shown.num_pieces
    told.characters += len(text)
    told.tokens += len(token_ids)
    told.logprobs += len(logprobs)
    return Delta(
        live.request.request_id,
        live.index,
        text,
        token_ids,
        logprobs,
        tuple(scored) if first and scored is not None else None,
        reason,
        shown.stop_reason if reason is not None else None,
        live.cached_tokens,
        0,
        live.error,
        began=live.began if first else None,
    )


def _last(output: RequestOutput, completion: CompletionOutput, told: _Told) -> Delta:
    """Of a completion that was under way until its request ended, or that is told of now for the first time."""
    return Delta(
        output.request_id,
        completion.index,
        completion.text[told.characters :],
        completion.token_ids[told.tokens :],
        (completion.logprobs or ())[told.logprobs :],
        None if told.begun else output.prompt_logprobs,
        completion.finish_reason,
        completion.stop_reason,
        completion.cached_tokens,
        output.discarded_tokens if completion.index == 0 else 0,
        (output.error or "") if completion.finish_reason == "error" else "",
        began=None if told.begun else completion.began,
    )
