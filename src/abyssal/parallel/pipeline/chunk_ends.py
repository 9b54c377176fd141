"""The ends of the model as runs of their own: the embedding before the first block, the head behind the last.

Behind the main model, and behind each MTP module, stand norm and loss; and before each MTP module what joins the hidden
state with the embedding of the next token [V3 eq. 21].  Norm, loss and the join to the next depth are one run, because
the hidden state after the norm goes to both.

Legend: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.model.mtp import MTPModule
from abyssal.model.norm import RMSNorm
from abyssal.model.stages import CutGraph
from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy
from abyssal.precision.linear import WeightQueue


@dataclass(frozen=True)
class Targets:
    """What one depth predicts, and how its loss counts."""

    tokens_T: Tensor
    learned_T: Tensor | None
    """Which positions are learned; None for all."""
    count: int
    """Learned targets of the global batch: the loss is a share of the mean over them."""
    weight: float = 1.0
    """Of this depth in the whole loss: 1 for the main model, λ/D for an MTP module [V3 eq. 25]."""


class EmbeddingRun:
    """The embedding of one micro-batch."""

    def __init__(self, model: Transformer, tokens_T: Tensor) -> None:
        self._model = model
        self._tokens_T = tokens_T
        self._graph = CutGraph()

    def forward(self) -> Tensor:
        with torch.enable_grad():
            x_TD = self._model.embedded(self._tokens_T)
        self._graph.outputs({"x_TD": x_TD})
        return x_TD

    def backward_input(self, gradient_TD: Tensor) -> None:
        """The gradient of the embedding itself."""
        self._graph.backward({"x_TD": gradient_TD})


class HeadRun:
    """What is behind the blocks of one depth (0: the main model), for one micro-batch.

    Args:
        inputs: token ids by depth.
        targets: by depth.
        losses: where the loss is put, as a share, without its weight.
    """

    def __init__(
        self, model: Transformer, depth: int, inputs: Sequence[Tensor], targets: Sequence[Targets], losses: list[Tensor]
    ) -> None:
        self._model = model
        self._depth = depth
        self._targets = targets[depth]
        self._next_tokens_T = inputs[depth + 1] if depth < len(model.mtp) else None
        self._losses = losses
        self._graph = CutGraph()
        self._queue = WeightQueue()
        self._one: Tensor | None = None

    def forward(self, x_TD: Tensor) -> Tensor | None:
        """Norm and loss; what the next depth's block reads, None behind the last."""
        x_TD = self._graph.inputs({"x_TD": x_TD})["x_TD"]
        with torch.enable_grad():
            hidden_TD = self._norm()(x_TD)
            loss = self._loss(hidden_TD)
            outputs = {"loss": loss * self._targets.weight}
            next_TD = None
            if self._next_tokens_T is not None:
                outputs["x_TD"] = next_TD = self._join(hidden_TD, self._next_tokens_T)
        self._losses.append(loss.detach())
        self._one = torch.ones_like(outputs["loss"])
        self._graph.outputs(outputs)
        return next_TD

    def backward_input(self, gradient_TD: Tensor | None) -> Tensor:
        """The gradient of the last block's output; those of norm, head and embedding are added."""
        assert self._one is not None
        gradients = {"loss": self._one} if gradient_TD is None else {"loss": self._one, "x_TD": gradient_TD}
        self._one = None
        return self._graph.backward(gradients)["x_TD"]

    def backward_weight(self) -> None:
        """That of the MTP projection, which waits."""
        self._queue.run()

    def _norm(self) -> RMSNorm:
        norm = self._model.norm if self._depth == 0 else self._model.mtp[self._depth - 1].norm
        assert isinstance(norm, RMSNorm)
        return norm

    def _loss(self, hidden_TD: Tensor) -> Tensor:
        tokens_T, learned_T = self._targets.tokens_T, self._targets.learned_T
        if learned_T is not None:
            hidden_TD, tokens_T = hidden_TD[learned_T], tokens_T[learned_T]
        model = self._model
        summed = linear_cross_entropy(hidden_TD, model.head_weight, tokens_T, model.recipe.product("head"))
        return summed / max(1, self._targets.count)

    def _join(self, hidden_TD: Tensor, tokens_T: Tensor) -> Tensor:
        """[V3 eq. 21]"""
        module = self._model.mtp[self._depth]
        assert isinstance(module, MTPModule)
        return module.joined(self._model.embedded(tokens_T), hidden_TD, self._queue)
