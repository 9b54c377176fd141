"""One transformer block, cut into the stages that training, serving and the planner interleave.

The stages are methods here and are put in a row in ``model/stages.py``.  In a dense layer the feed-forward runs where
the shared expert would, and the stages around the routed experts have nothing to do.

Legend: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.model.attention import build_attention
from abyssal.model.experts import FFN, MoE
from abyssal.model.native_layer import NativeLayer
from abyssal.model.norm import RMSNorm
from abyssal.model.stages import StageIO, run_stages
from abyssal.model.step import Step
from abyssal.precision.operand import Activation, Operand, operand, received
from abyssal.precision.recipe import LinearEntry, Recipe
from abyssal.spec.model import ModelSpec
from abyssal.spec.placement import Placement


class Block(nn.Module):
    """Attention and feed-forward with their norms and residuals.

    Args:
        layer: number of the block; MTP modules count on after the last layer.
        dense: whether the feed-forward is dense.
        expert_rank: which of the placement's ranks this is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        dense: bool,
        recipe: Recipe,
        placement: Placement | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expert_rank: int = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.native = NativeLayer()
        self.forgets_norms = "norm" in recipe.recompute
        self.attention_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, device, dtype)
        self.attention = build_attention(spec, recipe, device, dtype)
        self.ffn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, device, dtype)
        self.ffn: FFN | MoE
        if dense:
            self.ffn = FFN(spec.hidden_size, spec.dense_ffn_size, recipe, "dense", device, dtype)
        else:
            self.ffn = MoE(spec, recipe, placement, device, dtype, expert_rank)

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        """The stages in a row, as one native call where that is the same."""
        y_TD = None if torch.is_grad_enabled() else self.native.run(self, x_TD, step)
        return run_stages(self, x_TD, step) if y_TD is None else y_TD

    def attention_in(self, io: StageIO, step: Step) -> StageIO:
        """Norm, projections, rotation, cache write."""
        h = self._attention_input(io.x_TD)
        query_THQ, entries_TX = self.attention.project(h, self.layer, step)
        if self.forgets_norms:
            step.forgotten.forget_activation(self.layer, h, lambda: self._attention_input(io.x_TD))
        return StageIO(x_TD=io.x_TD, query_THQ=query_THQ, entries_TX=entries_TX)

    def _attention_input(self, x_TD: Tensor) -> Activation:
        return self.attention.input_operand(self.attention_norm(x_TD))

    def attention_out(self, io: StageIO, step: Step) -> StageIO:
        """Attention, output projection, residual, norm, router."""
        assert io.query_THQ is not None and io.entries_TX is not None
        x_TD = io.x_TD + self.attention.attend(io.query_THQ, io.entries_TX, self.layer, step)
        u_TD = self.ffn_norm(x_TD)
        if isinstance(self.ffn, FFN):
            return StageIO(x_TD=x_TD, u_TD=u_TD)
        routing = self.ffn.router(u_TD, self.layer, step)
        plan = step.dispatcher.plan(self.layer, routing.expert_ids_TK)
        return StageIO(x_TD=x_TD, u_TD=u_TD, weights_TK=routing.weights_TK, plan=plan)

    def shared(self, io: StageIO, step: Step) -> StageIO:
        """The shared experts, or a dense layer's feed-forward."""
        ffn = self.ffn if isinstance(self.ffn, FFN) else self.ffn.shared
        assert io.u_TD is not None
        u = io.u_TD if ffn is None else operand(io.u_TD, ffn.gate_up.entry)
        shared_TD = None if ffn is None else ffn(u, self.layer, step)
        if self.forgets_norms:
            self._forget_input(io, u, None if ffn is None else ffn.gate_up.entry, step)
        return io.having(u_TD=None, shared_TD=shared_TD)

    def _forget_input(self, io: StageIO, u: Activation, entry: LinearEntry | None, step: Step) -> None:
        """Forget the feed-forward's normalised input, which the router keeps too, and what was made of it."""
        assert io.u_TD is not None
        x_TD = io.x_TD  # the record itself would keep the rows at experts
        normed = step.forgotten.shared(self.layer, lambda: self.ffn_norm(x_TD))
        step.forgotten.forget(self.layer, io.u_TD, normed)
        if isinstance(u, Operand) and entry is not None:
            step.forgotten.forget_activation(self.layer, u, lambda: operand(normed(), entry))

    def experts(self, io: StageIO, step: Step) -> StageIO:
        """The routed experts over the rows sent to this rank."""
        if not isinstance(self.ffn, MoE):
            return io
        assert io.rows_AD is not None and io.weights_A is not None and io.plan is not None
        entry, codes = self.ffn.experts.gate_up_entry, io.rows_codes
        rows = operand(io.rows_AD, entry) if codes is None else received(io.rows_AD, codes, entry)
        rows_AD = self.ffn.experts(rows, io.weights_A, io.plan.counts, self.layer, step)
        return io.having(rows_AD=rows_AD, rows_codes=None, weights_A=None)

    def finish(self, io: StageIO, step: Step) -> StageIO:
        """Residual."""
        x_TD = io.x_TD
        for part_TD in (io.shared_TD, io.combined_TD):
            if part_TD is not None:
                x_TD = x_TD + part_TD
        step.forgotten.recall_before(self.layer, x_TD)
        return StageIO(x_TD=x_TD)

    @property
    def placement(self) -> Placement | None:
        """Where this block's routed experts are; None in a dense layer."""
        return self.ffn.experts.placement if isinstance(self.ffn, MoE) else None
