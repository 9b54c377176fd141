"""Keeping experts equally busy: the bias that moves without a loss, the losses beside it, and how far off it is.

- Loss-free balancing [V3 eq. 16]: after each step, an expert that was given more than its share has its correction bias
  lowered by γ, one given less has it raised.  Only the sign counts; the loads are those of the whole global batch,
  counted once, in the forward pass.
- Balance losses, each α Σ_i f_i P_i with f the share of tokens and P the share of scores:

  ===================  =================================  =======================================================
  sequence-wise        [V3 eq. 17–20]                     experts, in each sequence, by the TopK of unbiased scores
  batch-wise           [V3 section 4.5.3]                 the same over all tokens of a micro-batch
  expert               [V2 eq. 23–25]                     experts, in each sequence, by where tokens really went
  device               [V2 eq. 26–28]                     groups of experts: mean of f, sum of P
  communication        [V2 eq. 29–31]                     tokens that reach a group at all
  ===================  =================================  =======================================================

- MaxVio = (largest load − mean load) / mean load of a layer (arXiv 2408.15664).  Of one step's loads it is
  MaxVio_batch; of a whole evaluation set's, MaxVio_global.

Legend: T tokens, E experts, K chosen experts, B sequences, G groups (devices).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from abyssal.model.context import AttentionContext, PackedBatch
from abyssal.model.experts import MoE
from abyssal.model.router import Routing
from abyssal.model.transformer import Transformer
from abyssal.spec.model import MoESpec
from abyssal.train.config import BalanceConfig

Loads = dict[int, Tensor]
"""By layer, the tokens sent to each logical expert, (E,) int64; MTP modules count on after the last layer."""


class BalanceLosses:
    """The balance losses of one layer, the mean over the batch's sequences; a ``BalanceLoss`` of ``model.step``.

    Sequences of unequal length (documents that a mask keeps apart) count by their tokens, so that how a batch is cut
    into micro-batches changes nothing.

    Args:
        moe: the layer's gate.
        config: the coefficients.
        scale: factor on all of them, such as 1 / micro-batches of a step.

    Raises:
        ValueError: a loss over devices for experts in one group.
    """

    def __init__(self, moe: MoESpec, config: BalanceConfig, scale: float = 1.0) -> None:
        self._moe = moe
        self._config = config
        self._scale = scale
        if moe.num_groups == 1:
            for name in ("device_alpha", "communication_alpha"):
                if getattr(config, name):
                    raise ValueError(
                        f"{name} is {getattr(config, name)}, but the model's experts are one group; set it to 0, or "
                        "give a model with num_groups above 1"
                    )

    @property
    def wanted(self) -> bool:
        """Whether any coefficient is set."""
        config = self._config
        return any(
            (
                config.sequence_alpha,
                config.batch_alpha,
                config.expert_alpha,
                config.device_alpha,
                config.communication_alpha,
            )
        )

    def __call__(self, layer: int, scores_TE: Tensor, expert_ids_TK: Tensor, context: AttentionContext) -> Tensor:
        assert isinstance(context, PackedBatch), "training packs its batches"
        config, top_k = self._config, self._moe.top_k
        lengths_B1 = torch.tensor(context.lengths, device=scores_TE.device)[:, None]
        sequences = _Sequences(lengths_B1, len(scores_TE))
        share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        p_BE = sequences.sum(share_TE) / lengths_B1.to(scores_TE.dtype)
        total = scores_TE.new_zeros(())
        if config.sequence_alpha or config.batch_alpha:
            top_TK = scores_TE.detach().topk(top_k, -1).indices
            counts_BE = sequences.count(top_TK, scores_TE.shape[1])
            f_BE = _frequency(counts_BE, lengths_B1, top_k, p_BE.dtype)
            total = total + config.sequence_alpha * _mean_product(f_BE, p_BE, lengths_B1)
            if config.batch_alpha:
                all_11 = lengths_B1.sum(0, keepdim=True)
                f_1E = _frequency(counts_BE.sum(0, keepdim=True), all_11, top_k, p_BE.dtype)
                total = total + config.batch_alpha * (f_1E * share_TE.mean(0, keepdim=True)).sum()
        if config.expert_alpha or config.device_alpha or config.communication_alpha:
            total = total + self._v2_losses(expert_ids_TK, p_BE, sequences, lengths_B1)
        return total * self._scale

    def _v2_losses(self, expert_ids_TK: Tensor, p_BE: Tensor, sequences: _Sequences, lengths_B1: Tensor) -> Tensor:
        """[V2 eq. 23–31]; a device holds one group of experts."""
        config, moe, num_experts = self._config, self._moe, p_BE.shape[1]
        counts_BE = sequences.count(expert_ids_TK, num_experts)
        f_BE = _frequency(counts_BE, lengths_B1, moe.top_k, p_BE.dtype)
        p_BG = p_BE.unflatten(1, (moe.num_groups, -1)).sum(-1)
        total = config.expert_alpha * _mean_product(f_BE, p_BE, lengths_B1)
        if config.device_alpha:
            f_BG = f_BE.unflatten(1, (moe.num_groups, -1)).mean(-1)
            total = total + config.device_alpha * _mean_product(f_BG, p_BG, lengths_B1)
        if config.communication_alpha:
            groups_TK = expert_ids_TK // (num_experts // moe.num_groups)
            sent_TG = torch.zeros(len(groups_TK), moe.num_groups, dtype=p_BE.dtype, device=p_BE.device)
            sent_TG.scatter_(1, groups_TK, 1.0)
            f_BG = sequences.sum(sent_TG) * (moe.num_groups / moe.num_kept_groups) / lengths_B1.to(p_BE.dtype)
            total = total + config.communication_alpha * _mean_product(f_BG, p_BG, lengths_B1)
        return total


class _Sequences:
    """Sums over the tokens of each sequence of a packed batch."""

    def __init__(self, lengths_B1: Tensor, num_tokens: int) -> None:
        self._num = len(lengths_B1)
        numbers = torch.arange(self._num, device=lengths_B1.device)
        self._sequence_T = torch.repeat_interleave(numbers, lengths_B1[:, 0], output_size=num_tokens)

    def sum(self, values_TX: Tensor) -> Tensor:
        """(B, X)."""
        return values_TX.new_zeros(self._num, values_TX.shape[1]).index_add(0, self._sequence_T, values_TX)

    def count(self, ids_TK: Tensor, num_ids: int) -> Tensor:
        """(B, num_ids) int64: how often each id stands in each sequence."""
        flat = (self._sequence_T[:, None] * num_ids + ids_TK).flatten()
        return torch.bincount(flat, minlength=self._num * num_ids).view(self._num, num_ids)


def _frequency(counts_BE: Tensor, lengths_B1: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """f_i = E / (K T) · counts: 1 where an expert has its share."""
    return counts_BE * (counts_BE.shape[1] / top_k) / lengths_B1.to(dtype)


def _mean_product(f_BX: Tensor, p_BX: Tensor, lengths_B1: Tensor) -> Tensor:
    """Σ f P, mean over sequences by their tokens."""
    return (f_BX * p_BX * (lengths_B1.to(p_BX.dtype) / lengths_B1.sum())).sum()


def add_loads(loads: Loads, routings: Mapping[int, Routing], num_tokens: int | None = None) -> None:
    """Add what one pass sent to each expert to ``loads``: of its first ``num_tokens``, or of all."""
    for layer, routing in routings.items():
        load_E = routing.load(num_tokens)
        loads[layer] = loads[layer] + load_E if layer in loads else load_E


@torch.no_grad()
def update_biases(model: Transformer, loads: Mapping[int, Tensor], speed: float) -> None:
    """b_i += γ sign(mean load − load_i) in every layer that has a bias [V3 section 2.1.2].

    Args:
        loads: of the whole global batch of one step.
        speed: γ.
    """
    for block in model.blocks():
        bias_E = block.ffn.router.bias_E if isinstance(block.ffn, MoE) and block.layer in loads else None
        if bias_E is not None and not bias_E.is_meta:
            load_E = loads[block.layer].to(torch.float32)
            bias_E += speed * torch.sign(load_E.mean() - load_E)


def max_violation(load_E: Tensor) -> float:
    """(largest − mean) / mean of one layer's loads; 0 is perfect balance, E / K − 1 collapse."""
    load = load_E.to(torch.float64)
    return float((load.max() - load.mean()) / load.mean())


def mean_max_violation(loads: Mapping[int, Tensor]) -> float:
    """MaxVio averaged over layers; 0 for a model without experts."""
    return sum(max_violation(load_E) for load_E in loads.values()) / len(loads) if loads else 0.0
