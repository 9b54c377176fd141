"""What a model is worth on held-out text: bits per byte, how often its drafts are right, how evenly its experts work.

Bits per byte compare across vocabularies, tokenizers and compressors; perplexity only within one tokenizer.

MTP's acceptance is what speculative decoding would see on this text: at position i, depth k has read the tokens up to
t_{i+k} and drafts t_{i+k+1}; the draft is accepted where the main model, having read the same text, would greedily say
the same.  A chain of drafts stands as far as all of them are accepted, so one verified step yields 1 + Σ_k chain_k
tokens.  (In real decoding a depth reads the drafts before it, which are then the model's own choices.)  Acceptance
means something only beside the *unigram rate*, that of always drafting one constant token, here the one that suits the
main model's choices best: no constant can do better.

Legend: B sequences, S positions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.data.batches import bits_per_byte
from abyssal.model.dispatch import Dispatcher
from abyssal.model.step import Step
from abyssal.model.transformer import Transformer
from abyssal.precision.head import token_losses
from abyssal.train.balance import Loads, add_loads, mean_max_violation
from abyssal.train.loss import hidden_states, packed_step, targets
from abyssal.train.ranks import SingleRank

Forward = Callable[[Transformer, Tensor, Step], Iterator[Tensor] | None]
"""Hidden states of the main model and of each MTP depth, as :func:`~abyssal.train.loss.hidden_states`."""


@dataclass(frozen=True)
class Evaluation:
    """Measured on one set of sequences.  Tuples have one entry a depth of MTP."""

    loss: float
    """Nats a learned token, main model."""
    bits_per_byte: float
    num_tokens: int
    """Learned targets."""
    num_bytes: int
    """Of text that they stand for."""
    mtp_losses: tuple[float, ...]
    """Nats a token."""
    mtp_acceptance: tuple[float, ...]
    """Share of positions at which the depth's draft is the main model's own choice."""
    mtp_chain: tuple[float, ...]
    """Share of positions at which it and all depths before it are accepted."""
    mtp_unigram_rate: tuple[float, ...]
    """Acceptance of the best constant draft."""
    loads: Loads
    """Of the whole set."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def max_violation(self) -> float:
        """MaxVio_global, averaged over layers."""
        return mean_max_violation(self.loads)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one verified decoding step would yield on this text, drafts included."""
        return 1.0 + sum(self.mtp_chain)


class _Drafts:
    """Counts drafts against the main model's choices at the same text position."""

    def __init__(self, vocab_size: int, depths: int) -> None:
        self.accepted = [0] * depths
        self.chained = [0] * depths
        self.drafted = [0] * depths
        self.choices_DV = torch.zeros(depths, vocab_size, dtype=torch.int64)

    def add(self, best_BS: list[Tensor], learned_BS: list[Tensor | None]) -> None:
        """``best_BS``: of the main model and each depth.  ``main[:, i + k]`` and ``depth_k[:, i]`` both name token
        i + k + 1; a sequence's last k drafts have no peer."""
        main_BS, chain = best_BS[0], None
        for depth, (draft_BS, learned) in enumerate(zip(best_BS[1:], learned_BS[1:], strict=True), start=1):
            choices, drafts = main_BS[:, depth:], draft_BS[:, : main_BS.shape[1] - depth]
            right = choices == drafts
            chain = right if chain is None else chain[:, : right.shape[1]] & right
            counted = torch.ones_like(right) if learned is None else learned[:, : right.shape[1]]
            self.accepted[depth - 1] += int((right & counted).sum())
            self.chained[depth - 1] += int((chain & counted).sum())
            self.drafted[depth - 1] += int(counted.sum())
            self.choices_DV[depth - 1] += torch.bincount(choices[counted].cpu(), minlength=self.choices_DV.shape[1])

    def sum_over(self, ranks: SingleRank) -> None:
        """Count what every rank counted."""
        counts = ranks.sum_counts([*self.accepted, *self.chained, *self.drafted])
        depths = len(self.accepted)
        self.accepted, self.chained = counts[:depths], counts[depths : 2 * depths]
        self.drafted = counts[2 * depths :]
        ranks.sum_tensors([self.choices_DV] if depths else [])

    def rates(self, counts: Iterable[int]) -> tuple[float, ...]:
        return tuple(count / total if total else 0.0 for count, total in zip(counts, self.drafted, strict=True))

    @property
    def unigram_rate(self) -> tuple[float, ...]:
        return self.rates(self.choices_DV.max(-1).values.tolist() if self.drafted else [])


class _Sums:
    """Losses, tokens and bytes added up over batches."""

    def __init__(self, depths: int) -> None:
        self.nats = [0.0] * (depths + 1)
        self.tokens = [0] * (depths + 1)
        self.bytes = 0

    def sum_over(self, ranks: SingleRank) -> None:
        """Add up what every rank has."""
        self.nats = ranks.sum(self.nats)
        *self.tokens, self.bytes = ranks.sum_counts([*self.tokens, self.bytes])

    def mean(self, depth: int) -> float:
        return self.nats[depth] / max(1, self.tokens[depth])


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    dispatcher: Dispatcher | None = None,
    ranks: SingleRank | None = None,
    forward: Forward = hidden_states,
) -> Evaluation:
    """Measure ``model`` on held-out rows.

    Args:
        batches: rows of S + 1 + MTP depth tokens, the same on all ranks, which share them out.
        token_bytes: bytes of text that each token id stands for.
        dispatcher: of many ranks; by default every expert is here.
        forward: gives the hidden states; None on a rank whose layers are not the last.

    Raises:
        ValueError: no batch at all, or no target that stands for a byte.
    """
    ranks = ranks or SingleRank()
    depths = len(model.mtp)
    drafts, loads, sums = _Drafts(model.spec.vocab_size, depths), Loads(), _Sums(depths)
    bytes_V = torch.from_numpy(token_bytes)
    for whole in batches:
        batch, num_rows = _own_rows(whole, ranks)
        step = packed_step(model, batch, dispatcher=dispatcher)
        hidden = forward(model, torch.from_numpy(batch.tokens_BX).to(model.device), step)
        if hidden is not None:
            _measure(model, batch, num_rows, hidden, bytes_V, drafts, sums)
        add_loads(loads, step.routings, num_rows * (batch.tokens_BX.shape[1] - 1 - depths))
    drafts.sum_over(ranks)
    sums.sum_over(ranks)
    loads = ranks.sum_loads(loads)
    return Evaluation(
        loss=sums.mean(0),
        bits_per_byte=bits_per_byte(sums.nats[0], sums.bytes),
        num_tokens=sums.tokens[0],
        num_bytes=sums.bytes,
        mtp_losses=tuple(sums.mean(depth + 1) for depth in range(depths)),
        mtp_acceptance=drafts.rates(drafts.accepted),
        mtp_chain=drafts.rates(drafts.chained),
        mtp_unigram_rate=drafts.unigram_rate,
        loads=loads,
    )


def _own_rows(batch: Batch, ranks: SingleRank) -> tuple[Batch, int]:
    """This rank's rows, and how many of them count: all ranks run as many, so that they meet at the experts, and where
    there are too few some are there twice."""
    each = -(-len(batch) // ranks.num_ranks)
    first, _ = ranks.share(0, each * ranks.num_ranks)
    num_rows = min(each, max(0, len(batch) - first))
    return batch.take([*range(first, first + num_rows), *([0] * (each - num_rows))]), num_rows


def _measure(
    model: Transformer,
    batch: Batch,
    num_rows: int,
    hidden: Iterator[Tensor],
    bytes_V: Tensor,
    drafts: _Drafts,
    sums: _Sums,
) -> None:
    """Run ``batch`` and add up what its first ``num_rows`` rows give."""
    depths, device = len(model.mtp), model.device
    aims = targets(batch.part(0, num_rows), depths)
    length = batch.tokens_BX.shape[1] - 1 - depths
    best_BS: list[Tensor] = []
    for depth, (hidden_TD, aim) in enumerate(zip(hidden, aims, strict=True)):
        losses_T, best_T = token_losses(
            hidden_TD[: num_rows * length], model.head_weight, aim.tokens_T.to(device), model.recipe.product("head")
        )
        learned_T = slice(None) if aim.learned_T is None else aim.learned_T
        sums.nats[depth] += float(losses_T.cpu()[learned_T].sum(dtype=torch.float64))
        sums.tokens[depth] += aim.num_learned
        best_BS.append(best_T.cpu().view(num_rows, length))
    main = aims[0].tokens_T if aims[0].learned_T is None else aims[0].tokens_T[aims[0].learned_T]
    sums.bytes += int(bytes_V[main].sum())
    shape = num_rows, length
    drafts.add(best_BS, [None if aim.learned_T is None else aim.learned_T.view(shape) for aim in aims])
