"""Changes to single logits before sampling: penalties for repeating, and the request's own bias.

The repetition penalty is that of CTRL (Keskar et al. 2019) as transformers applies it, over prompt and output.
Presence and frequency penalties are the OpenAI API's, over the output alone.  They touch a few hundred logits of a
row, so they are gathered and scattered by token id and the cost does not grow with the vocabulary.

Legend: V vocabulary, U different tokens seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from abyssal.engine.messages import SamplingParams


class TokenHistory:
    """Which tokens a sequence holds, and how often its output holds them."""

    def __init__(self, prompt_ids: Iterable[int] = (), output_ids: Iterable[int] = ()) -> None:
        self._prompt = frozenset(prompt_ids)
        self._output = Counter(output_ids)

    def append(self, tokens: Iterable[int]) -> None:
        """Note new tokens of the output."""
        self._output.update(tokens)

    def counts(self, drafted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_U, times_U) of the output and of tokens drafted after it."""
        output = self._output + Counter(drafted) if drafted else self._output
        return _pairs(output, np.int64)

    def seen(self, drafted: Sequence[int] = ()) -> np.ndarray:
        """tokens_U of the prompt, the output and tokens drafted after it."""
        tokens = self._prompt.union(self._output, drafted)
        return np.fromiter(tokens, np.int64, len(tokens))


def has_penalty(params: SamplingParams) -> bool:
    """Whether the tokens seen so far change the logits: only then a history has to be kept."""
    return params.repetition_penalty != 1.0 or has_output_penalty(params)


def has_output_penalty(params: SamplingParams) -> bool:
    """Whether the output's own tokens do."""
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalise(logits_V: np.ndarray, params: SamplingParams, history: TokenHistory, drafted: Sequence[int] = ()) -> None:
    """Apply the penalties of ``params`` to one row of FP32 logits, in place."""
    if params.repetition_penalty != 1.0:
        seen_U = history.seen(drafted)
        penalty = np.float32(params.repetition_penalty)
        logits_U = logits_V[seen_U]
        logits_V[seen_U] = np.where(logits_U < 0, logits_U * penalty, logits_U / penalty)
    if has_output_penalty(params):
        tokens_U, times_U = history.counts(drafted)
        taken_U = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times_U
        logits_V[tokens_U] -= taken_U.astype(np.float32)


def add_bias(logits_V: np.ndarray, bias: Mapping[int, float]) -> None:
    """Add ``bias`` to one row of FP32 logits, in place.

    Raises:
        ValueError: a token outside the vocabulary.
    """
    tokens_U, biases_U = _pairs(bias, np.float32)
    if len(tokens_U) and tokens_U.max() >= len(logits_V):
        raise ValueError(
            f"logit_bias: token {tokens_U.max()} is outside the vocabulary of {len(logits_V)}; leave it out"
        )
    logits_V[tokens_U] += biases_U


def _pairs(mapping: Mapping[int, float], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    count = len(mapping)
    return np.fromiter(mapping.keys(), np.int64, count), np.fromiter(mapping.values(), dtype, count)
