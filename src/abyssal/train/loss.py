"""What training minimises: cross-entropy of the next token, and of the tokens after it [V3 eq. 24–25].

L = L_main + λ/D Σ_k L_k, each L the mean over all tokens of the batch.  A batch row carries ``S + 1 + D`` tokens (see
``model/mtp.py``), so that no position is lost at any depth.

Legend: B sequences, S positions, T = B·S tokens, D model (in shapes) or MTP depth (in λ/D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from abyssal.model.context import PackedBatch
from abyssal.model.step import BalanceLoss, Step
from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of one (micro-)batch and its parts, in nats a token."""

    total: Tensor
    """What to call ``backward`` on, once.  The balance loss is not in it: it joins the backward by itself."""
    main: Tensor
    mtp: tuple[Tensor, ...]
    """Of each depth, without λ."""
    step: Step
    """Routings and balance losses of the pass."""


def hidden_and_targets(model: Transformer, tokens_BX: Tensor, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """For the main model, then each MTP depth: hidden states (T, D) after the norm, and the tokens they predict (T,).

    Args:
        tokens_BX: ``S + 1 + mtp_depth`` tokens a row.
        step: over ``B`` sequences of ``S``.
    """
    depths = len(model.mtp)
    length = tokens_BX.shape[1] - 1 - depths
    hidden_TD = model.hidden(tokens_BX[:, :length].flatten(), step)
    yield hidden_TD, tokens_BX[:, 1 : length + 1].flatten()
    for depth in range(depths):
        inputs_T = tokens_BX[:, depth + 1 : length + depth + 1].flatten()
        hidden_TD = model.mtp_hidden(depth, inputs_T, hidden_TD, step)
        yield hidden_TD, tokens_BX[:, depth + 2 : length + depth + 2].flatten()


def packed_step(model: Transformer, tokens_BX: Tensor, balance: BalanceLoss | None = None) -> Step:
    """A step in which each row is one sequence."""
    length = tokens_BX.shape[1] - 1 - len(model.mtp)
    context = PackedBatch([length] * len(tokens_BX), device=tokens_BX.device)
    return model.step(context, balance=balance)


def training_loss(
    model: Transformer, tokens_BX: Tensor, mtp_weight: float, balance: BalanceLoss | None = None
) -> TrainingLoss:
    """Forward pass and loss.

    Args:
        tokens_BX: int64, ``S + 1 + mtp_depth`` tokens a row.
        mtp_weight: λ [V3 section 4.2: 0.3, then 0.1].
        balance: the auxiliary loss of each MoE layer.
    """
    step = packed_step(model, tokens_BX, balance)
    entry = model.recipe.head
    means = [
        linear_cross_entropy(hidden_TD, model.head_weight, targets_T, entry) / len(targets_T)
        for hidden_TD, targets_T in hidden_and_targets(model, tokens_BX, step)
    ]
    main, mtp = means[0], tuple(means[1:])
    total = main
    for loss in mtp:
        total = total + loss * (mtp_weight / len(mtp))
    return TrainingLoss(total, main.detach(), tuple(loss.detach() for loss in mtp), step)
