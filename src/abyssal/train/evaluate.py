"""What a model is worth on held-out text: bits per byte, how often its drafts are right, how evenly its experts work.

Bits per byte compare across vocabularies, tokenizers and compressors; perplexity only within one tokenizer.

MTP's second-token acceptance is what speculative decoding would see: at position i the module has read t_{i+1} and
drafts t_{i+2}; the draft is accepted where the main model, having read the same text, would greedily say the same.  It
means something only beside the *unigram rate*, the acceptance of always drafting one constant token, here the one that
suits the main model's choices best: no constant can do better.

Legend: B sequences, S positions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.data.batches import bits_per_byte, held_out_batches, target_bytes
from abyssal.model.transformer import Transformer
from abyssal.precision.head import token_losses
from abyssal.train.balance import Loads, add_loads, mean_max_violation
from abyssal.train.loss import hidden_and_targets, packed_step


@dataclass(frozen=True)
class Evaluation:
    """Measured on one set of sequences."""

    loss: float
    """Nats a token, main model."""
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    mtp_loss: float | None
    """Nats a token of the first MTP depth; None without MTP."""
    mtp_acceptance: float | None
    """Share of positions at which the first depth's draft is the main model's own choice."""
    mtp_unigram_rate: float | None
    """The same of the best constant draft."""
    loads: Loads
    """Of the whole set."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def max_violation(self) -> float:
        """MaxVio_global, averaged over layers."""
        return mean_max_violation(self.loads)


class _Drafts:
    """Counts drafts against the main model's choices at the same text position."""

    def __init__(self, vocab_size: int) -> None:
        self.accepted = 0
        self.choices_V = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, main_BS: Tensor, draft_BS: Tensor) -> None:
        """``main_BS[:, i + 1]`` and ``draft_BS[:, i]`` both name token i + 2; a sequence's last draft has no peer."""
        choices, drafts = main_BS[:, 1:], draft_BS[:, :-1]
        self.accepted += int((choices == drafts).sum())
        self.choices_V += torch.bincount(choices.flatten().cpu(), minlength=len(self.choices_V))

    def rates(self) -> tuple[float | None, float | None]:
        """Acceptance, and that of the best constant."""
        total = int(self.choices_V.sum())
        return (self.accepted / total, int(self.choices_V.max()) / total) if total else (None, None)


def _predictions(model: Transformer, tokens_BX: Tensor, loads: Loads) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the main model, then of each MTP depth: losses and most likely tokens, (B, S)."""
    step = packed_step(model, tokens_BX)
    for hidden_TD, targets_T in hidden_and_targets(model, tokens_BX, step):
        losses_T, best_T = token_losses(hidden_TD, model.head_weight, targets_T, model.recipe.head)
        yield losses_T.view(len(tokens_BX), -1), best_T.view(len(tokens_BX), -1)
    add_loads(loads, step.routings)


@torch.no_grad()
def evaluate(
    model: Transformer,
    tokens: np.ndarray,
    token_bytes: np.ndarray,
    seq_len: int,
    batch_size: int,
    num_batches: int | None = None,
) -> Evaluation:
    """Measure ``model`` on held-out tokens.

    Args:
        tokens: one long array, as :func:`abyssal.data.corpus.tokenize` makes it.
        token_bytes: bytes of each token id.
        num_batches: batches spread evenly over the text; None takes all of it.

    Raises:
        ValueError: fewer tokens than one sequence needs.
    """
    batches = held_out_batches(tokens, seq_len, batch_size, num_batches, extra=len(model.mtp))
    drafts, loads = _Drafts(model.spec.vocab_size), Loads()
    nats = mtp_nats = 0.0
    num_tokens = num_bytes = 0
    for batch_BX in batches:
        predictions = list(_predictions(model, torch.from_numpy(batch_BX), loads))
        nats += float(predictions[0][0].sum(dtype=torch.float64))
        num_tokens += predictions[0][0].numel()
        num_bytes += target_bytes(batch_BX, seq_len, token_bytes)
        if len(predictions) > 1:
            mtp_nats += float(predictions[1][0].sum(dtype=torch.float64))
            drafts.add(predictions[0][1], predictions[1][1])
    acceptance, unigram_rate = drafts.rates()
    return Evaluation(
        loss=nats / num_tokens,
        bits_per_byte=bits_per_byte(nats, num_bytes),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        mtp_loss=mtp_nats / num_tokens if len(model.mtp) else None,
        mtp_acceptance=acceptance,
        mtp_unigram_rate=unigram_rate,
        loads=loads,
    )
