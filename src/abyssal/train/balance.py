"""Keeping experts equally busy: the bias that moves without a loss, the small loss beside it, and how far off it is.

- Loss-free balancing [V3 eq. 16]: after each step, an expert that was given more than its share has its correction bias
  lowered by γ, one given less has it raised.  Only the sign counts; the loads are those of the whole global batch,
  counted once, in the forward pass.
- Sequence-wise balance loss [V3 eq. 17–20]: α Σ_i f_i P_i within each sequence, against the rare extreme one.
- MaxVio = (largest load − mean load) / mean load of a layer (arXiv 2408.15664).  Of one step's loads it is
  MaxVio_batch; of a whole evaluation set's, MaxVio_global.

Legend: T tokens, E experts, K chosen experts, B sequences.
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

Loads = dict[int, Tensor]
"""By layer, the tokens sent to each logical expert, (E,) int64; MTP modules count on after the last layer."""


class SequenceBalanceLoss:
    """The loss of one layer, α Σ_i f_i P_i averaged over the batch's sequences; a ``BalanceLoss`` of ``model.step``.

    f_i counts the TopK of the *unbiased* scores over all experts (eq. 18), whatever the bias and the groups chose.

    Args:
        moe: the layer's gate.
        alpha: coefficient [V3 section 4.2: 1e-4].
        scale: factor on top of it, such as 1 / micro-batches of a step.
    """

    def __init__(self, moe: MoESpec, alpha: float, scale: float = 1.0) -> None:
        self.top_k = moe.top_k
        self.coefficient = alpha * scale

    def __call__(self, layer: int, scores_TE: Tensor, expert_ids_TK: Tensor, context: AttentionContext) -> Tensor:
        assert isinstance(context, PackedBatch), "training packs its batches"
        num_tokens, num_experts = scores_TE.shape
        num_sequences = len(context.lengths)
        lengths_B = torch.tensor(context.lengths, device=scores_TE.device)
        sequence_T = torch.repeat_interleave(
            torch.arange(num_sequences, device=scores_TE.device), lengths_B, output_size=num_tokens
        )
        top_TK = scores_TE.detach().topk(self.top_k, -1).indices
        chosen_T = (sequence_T[:, None] * num_experts + top_TK).flatten()
        counts_BE = torch.bincount(chosen_T, minlength=num_sequences * num_experts).view(num_sequences, -1)
        per_token_B1 = lengths_B.to(scores_TE.dtype)[:, None]
        f_BE = counts_BE * (num_experts / self.top_k) / per_token_B1
        share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        p_BE = scores_TE.new_zeros(num_sequences, num_experts).index_add(0, sequence_T, share_TE) / per_token_B1
        return (f_BE * p_BE).sum() * (self.coefficient / num_sequences)


def add_loads(loads: Loads, routings: Mapping[int, Routing]) -> None:
    """Add what one pass sent to each expert to ``loads``."""
    for layer, routing in routings.items():
        load_E = routing.load()
        loads[layer] = loads[layer] + load_E if layer in loads else load_E


@torch.no_grad()
def update_biases(model: Transformer, loads: Mapping[int, Tensor], speed: float) -> None:
    """b_i += γ sign(mean load − load_i) in every layer that has a bias [V3 section 2.1.2].

    Args:
        loads: of the whole global batch of one step.
        speed: γ.
    """
    for block in model.blocks():
        if isinstance(block.ffn, MoE) and block.ffn.router.bias_E is not None and block.layer in loads:
            load_E = loads[block.layer].to(torch.float32)
            block.ffn.router.bias_E += speed * torch.sign(load_E.mean() - load_E)


def max_violation(load_E: Tensor) -> float:
    """(largest − mean) / mean of one layer's loads; 0 is perfect balance, E / K − 1 collapse."""
    load = load_E.to(torch.float64)
    return float((load.max() - load.mean()) / load.mean())


def mean_max_violation(loads: Mapping[int, Tensor]) -> float:
    """MaxVio averaged over layers; 0 for a model without experts."""
    return sum(max_violation(load_E) for load_E in loads.values()) / len(loads) if loads else 0.0
