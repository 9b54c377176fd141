"""The gate: which experts a token goes to, and with what weight [V3 eq. 12–16].

Two families of gate share one function.  V3's takes the sigmoid of each logit, adds a bias for the choice alone
(eq. 16; nothing flows back through it), scores a group by its two best experts and renormalises the chosen scores.
V2's takes a softmax, scores a group by its best expert, and scales without renormalising.  Computed in FP32 at least.

Legend: T tokens, D model, E experts, K chosen experts, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.kernels.gate import native as native_gate
from abyssal.model.step import Step
from abyssal.precision.linear import linear
from abyssal.precision.recipe import LinearEntry
from abyssal.spec.model import MoESpec


@dataclass(frozen=True)
class Routing:
    """The routing of one layer: logical expert ids (T, K), their weights (T, K), every expert's score (T, E)."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor

    def load(self, num_tokens: int | None = None) -> Tensor:
        """(E,) tokens sent to each logical expert, int64: of the first ``num_tokens``, or of all."""
        return torch.bincount(self.expert_ids_TK[:num_tokens].flatten(), minlength=self.scores_TE.shape[1])

    def detach(self) -> Routing:
        return Routing(self.expert_ids_TK, self.weights_TK.detach(), self.scores_TE.detach())


class _AddLoss(torch.autograd.Function):
    """Hand ``weights`` through and give ``loss`` a gradient of one: the loss joins the backward of this layer alone,
    so that no schedule has to carry it to the end of the model."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=ctx.dtype, device=gradients[0].device)


def scores(logits_TE: Tensor, moe: MoESpec) -> Tensor:
    """Affinity of each token to each expert [V3 eq. 15]."""
    return logits_TE.sigmoid() if moe.scoring == "sigmoid" else logits_TE.softmax(-1)


def choose(scores_TE: Tensor, bias_E: Tensor | None, moe: MoESpec) -> Tensor:
    """The K experts of each token, best first, from its best groups [V3 eq. 14, 16; section 2.1.2]."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
    if moe.num_groups > 1 and moe.num_kept_groups < moe.num_groups:
        grouped = choice_TE.unflatten(1, (moe.num_groups, -1))
        sigmoid = moe.scoring == "sigmoid"
        group_scores_TG = grouped.topk(2, -1).values.sum(-1) if sigmoid else grouped.amax(-1)
        kept = group_scores_TG.topk(moe.num_kept_groups, -1).indices
        mask_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
        dropped = float("-inf") if sigmoid else 0.0
        choice_TE = grouped.masked_fill(mask_TG[..., None], dropped).view_as(choice_TE)
    return choice_TE.topk(moe.top_k, -1).indices


def gate(scores_TE: Tensor, expert_ids_TK: Tensor, moe: MoESpec) -> Tensor:
    """The weight of each chosen expert: its unbiased score, renormalised if so configured, scaled [V3 eq. 13]."""
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if moe.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * moe.route_scale if moe.route_scale != 1.0 else weights_TK


class Router(nn.Module):
    """Gate weights, one row an expert, and the correction bias that balances load without a loss."""

    bias_E: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        moe: MoESpec,
        entry: LinearEntry,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.entry = entry
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(moe.num_experts, device=device, dtype=torch.float32) if moe.correction_bias else None
        self.register_buffer("bias_E", bias)

    def forward(self, u_TD: Tensor, layer: int, step: Step) -> Routing:
        logits_TE = linear(u_TD, self.weight, self.entry, step.queue)
        forced = step.forced_routing is not None and layer in step.forced_routing
        if not forced and not torch.is_grad_enabled() and (routing := self._native(logits_TE)) is not None:
            step.routings[layer] = routing
            return routing
        if step.forced_routing is not None and layer in step.forced_routing:
            expert_ids_TK = step.forced_routing[layer]
            if expert_ids_TK.shape != (len(u_TD), self.moe.top_k):
                raise ValueError(
                    f"forced_routing: shape {tuple(expert_ids_TK.shape)} in layer {layer} does not fit {len(u_TD)} "
                    f"tokens and top_k {self.moe.top_k}; give the ids of this very batch"
                )
            if not torch.is_grad_enabled() and (routing := self._native(logits_TE)) is not None:
                step.routings[layer] = routing = self._forced(routing, expert_ids_TK)
                return routing
            scores_TE = scores(logits_TE, self.moe)
        else:
            scores_TE = scores(logits_TE, self.moe)
            expert_ids_TK = choose(scores_TE.detach(), self.bias_E, self.moe)
        weights_TK = gate(scores_TE, expert_ids_TK, self.moe)
        if step.balance is not None and torch.is_grad_enabled():
            loss = step.balance(layer, scores_TE, expert_ids_TK, step.context)
            step.balance_losses[layer] = loss.detach()
            weights_TK = _AddLoss.apply(weights_TK, loss)
        routing = Routing(expert_ids_TK, weights_TK, scores_TE)
        step.routings[layer] = routing.detach()
        return routing

    def _forced(self, routing: Routing, expert_ids_TK: Tensor) -> Routing:
        """Other experts in a native routing; where they are those it chose, its weights stand to the last bit."""
        same_T1 = (expert_ids_TK == routing.expert_ids_TK).all(1, keepdim=True)
        weights_TK = gate(routing.scores_TE, expert_ids_TK, self.moe)
        return Routing(expert_ids_TK, torch.where(same_T1, routing.weights_TK, weights_TK), routing.scores_TE)

    def _native(self, logits_TE: Tensor) -> Routing | None:
        """All of it in one native call, where there is one."""
        moe = self.moe
        groups, kept = (moe.num_groups, moe.num_kept_groups) if moe.num_groups > 1 else (1, 1)
        softmax = moe.scoring == "softmax"
        found = native_gate(logits_TE, self.bias_E, moe.top_k, groups, kept, softmax, moe.renormalise, moe.route_scale)
        return None if found is None else Routing(*found)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Casting the model leaves the bias in FP32: a step of 0.001 is lost in BF16 beside a bias of order one."""
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if bias_E is not None and self.bias_E is not None and self.bias_E.dtype != torch.float32:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self
