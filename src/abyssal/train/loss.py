"""What training minimises: cross-entropy of the next token, and of the tokens after it [V3 eq. 24–25].

L = L_main + λ/D Σ_k L_k, each L the mean over the learned targets of the *global* batch: a pass over part of it divides
by the whole batch's count, so that accumulation and ranks change nothing.  A batch row carries ``S + 1 + D`` tokens
(see ``model/mtp.py``), so that no position is lost at any depth.  A target is learned unless the batch says otherwise
(a user's words in fine-tuning), and never across documents that attention keeps apart.

Legend: B sequences, S positions, T = B·S tokens, D model (in shapes) or MTP depth (in λ/D), X = S + 1 + D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.model.context import PackedBatch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.step import BalanceLoss, Step
from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of one (micro-)batch and its parts, as shares of the global batch's means, in nats a token."""

    total: Tensor
    """What to call ``backward`` on, once.  The balance loss is not in it: it joins the backward by itself."""
    parts: tuple[float, ...]
    """Of the main model, then of each MTP depth, without λ."""
    step: Step
    """Routings and balance losses of the pass."""


@dataclass(frozen=True)
class Targets:
    """What one depth predicts: token ids (T,), and which positions are learned (T,), None for all."""

    tokens_T: Tensor
    learned_T: Tensor | None

    @property
    def num_learned(self) -> int:
        return len(self.tokens_T) if self.learned_T is None else int(self.learned_T.sum())


def targets(batch: Batch, depths: int) -> list[Targets]:
    """Of the main model, then of each of ``depths`` MTP modules."""
    length = batch.tokens_BX.shape[1] - 1 - depths
    document_BX = _document_numbers(batch)
    found = []
    for depth in range(depths + 1):
        columns = slice(depth + 1, length + depth + 1)
        learned = None
        if document_BX is not None:
            learned = document_BX[:, columns] == document_BX[:, :length]
        if batch.trained_BX is not None:
            trained = batch.trained_BX[:, columns]
            learned = trained if learned is None else learned & trained
        learned_T = None if learned is None else torch.from_numpy(np.ascontiguousarray(learned)).flatten()
        found.append(Targets(torch.from_numpy(batch.tokens_BX[:, columns]).flatten(), learned_T))
    return found


def _document_numbers(batch: Batch) -> np.ndarray | None:
    """(B, X): the number of each token's document within its row."""
    if batch.documents is None:
        return None
    rows = [np.repeat(np.arange(len(lengths)), lengths) for lengths in batch.documents]
    return np.array(rows, dtype=np.int64).reshape(batch.tokens_BX.shape)  # a rank may have no row of a small batch


def packed_step(
    model: Transformer, batch: Batch, balance: BalanceLoss | None = None, dispatcher: Dispatcher | None = None
) -> Step:
    """A step over the batch's first S positions: each row is one sequence, or each document of it."""
    length = batch.tokens_BX.shape[1] - 1 - len(model.mtp)
    rows = [(length,)] * len(batch) if batch.documents is None else [_cut(row, length) for row in batch.documents]
    context = PackedBatch([part for row in rows for part in row], device=model.device)
    return model.step(context, dispatcher, balance=balance)


def _cut(lengths: Sequence[int], length: int) -> list[int]:
    """The documents of a row within its first ``length`` tokens."""
    parts = []
    for part in lengths:
        if length <= 0:
            break
        parts.append(min(part, length))
        length -= part
    return parts


def hidden_states(model: Transformer, tokens_BX: Tensor, step: Step) -> Iterator[Tensor]:
    """Hidden states (T, D) after the norm of the main model, then of each MTP depth.

    Args:
        tokens_BX: ``S + 1 + mtp_depth`` tokens a row.
        step: over ``B`` rows of ``S`` tokens.
    """
    depths = len(model.mtp)
    length = tokens_BX.shape[1] - 1 - depths
    hidden_TD = model.hidden(tokens_BX[:, :length].flatten(), step)
    yield hidden_TD
    for depth in range(depths):
        inputs_T = tokens_BX[:, depth + 1 : length + depth + 1].flatten()
        hidden_TD = model.mtp_hidden(depth, inputs_T, hidden_TD, step)
        yield hidden_TD


def training_loss(
    model: Transformer,
    batch: Batch,
    mtp_weight: float,
    balance: BalanceLoss | None = None,
    counts: Sequence[int] | None = None,
    dispatcher: Dispatcher | None = None,
) -> TrainingLoss:
    """Forward pass and loss.

    Args:
        batch: int64 rows of ``S + 1 + mtp_depth`` tokens.
        mtp_weight: λ [V3 section 4.2: 0.3, then 0.1].
        balance: the auxiliary loss of each MoE layer.
        counts: learned targets of the global batch, of the main model and of each depth; this batch's own by default.
        dispatcher: of many ranks; by default every expert is here.
    """
    step = packed_step(model, batch, balance, dispatcher)
    device, depths = model.device, len(model.mtp)
    aims = targets(batch, depths)
    counts = counts or [aim.num_learned for aim in aims]
    hidden = hidden_states(model, torch.from_numpy(batch.tokens_BX).to(device), step)
    means = [
        _summed_loss(model, hidden_TD, aim, device) / max(1, count)
        for hidden_TD, aim, count in zip(hidden, aims, counts, strict=True)
    ]
    total = means[0]
    for loss in means[1:]:
        total = total + loss * (mtp_weight / depths)
    return TrainingLoss(total, tuple(float(loss.detach()) for loss in means), step)


def _summed_loss(model: Transformer, hidden_TD: Tensor, aim: Targets, device: torch.device) -> Tensor:
    tokens_T = aim.tokens_T.to(device)
    if aim.learned_T is not None:
        learned_T = aim.learned_T.to(device)
        hidden_TD, tokens_T = hidden_TD[learned_T], tokens_T[learned_T]
    return linear_cross_entropy(hidden_TD, model.head_weight, tokens_T, model.recipe.product("head"))
