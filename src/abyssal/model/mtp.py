"""Multi-token prediction: after the main model, a chain of modules each predicting one token further [V3 eq. 21–25].

Depth k at position i joins the previous depth's hidden state with the embedding of token t_{i+k} (eq. 21), runs one
whole block (eq. 22), and through the shared head predicts t_{i+k+1} (eq. 23); the loss is λ/D times the sum of the
depths' cross-entropies (eq. 24–25, in ``train/loss.py``).  Embedding and head are the main model's own.

A worked example, S = 4 and depth 1, tokens a b c d e f:

    position            0  1  2  3
    main model sees     a  b  c  d     predicts  b  c  d  e
    module 1 sees       b  c  d  e     predicts  c  d  e  f

so a training sequence carries S + 1 + depth tokens and no position is lost.  Two facts of published checkpoints differ
from the paper's text: the projection's columns are [embedding; hidden], and the incoming hidden state is the previous
one *after* its final norm.

Legend: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.model.block import Block
from abyssal.model.norm import RMSNorm
from abyssal.model.step import Step
from abyssal.precision.linear import Linear, WeightQueue
from abyssal.precision.recipe import Recipe
from abyssal.spec.model import ModelSpec
from abyssal.spec.placement import Placement


class MTPModule(nn.Module):
    """One depth of the chain.  Its block has the number ``num_layers + depth``, counted from zero."""

    def __init__(
        self,
        spec: ModelSpec,
        depth: int,
        recipe: Recipe,
        placement: Placement | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expert_rank: int = 0,
    ) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.embedding_norm = RMSNorm(hidden, eps, device, dtype)
        self.hidden_norm = RMSNorm(hidden, eps, device, dtype)
        self.projection = Linear(2 * hidden, hidden, recipe.product("mtp"), device, dtype)
        layer = spec.num_layers + depth
        self.block = Block(spec, layer, spec.moe is None, recipe, placement, device, dtype, expert_rank)
        self.norm = RMSNorm(hidden, eps, device, dtype)

    def joined(self, embedded_TD: Tensor, hidden_TD: Tensor, queue: WeightQueue | None) -> Tensor:
        """The block's input (T, D), of the next token's embedding and the previous depth's hidden state [V3 eq. 21]."""
        joined = torch.cat([self.embedding_norm(embedded_TD), self.hidden_norm(hidden_TD)], -1)
        return self.projection(joined, queue)

    def forward(self, embedded_TD: Tensor, hidden_TD: Tensor, step: Step) -> Tensor:
        """This depth's hidden state (T, D), after its norm: for the head and for the next depth."""
        return self.norm(self.block(self.joined(embedded_TD, hidden_TD, step.queue), step))
