"""How evenly recent tokens went to experts, for whoever watches a server.

One step in :data:`EVERY` is looked at, in one sum over all layers, so that decoding is not measurably slower for it;
what is older fades, half of it within :data:`HALF_LIFE` tokens looked at.  Exact counts of every step would cost an
operator a layer and step, and would say the same.

Legend: L layers with experts (of the main model), T tokens of a step, K chosen experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from abyssal.model.router import Routing
from abyssal.model.transformer import Transformer

EVERY = 8
HALF_LIFE = 2048.0


def expert_layers(model: Transformer) -> tuple[int, ...]:
    """Layers with experts, by number, without those of MTP modules."""
    return tuple(block.layer for block in model.blocks()[: len(model.layers)] if block.placement is not None)


class ExpertLoads:
    """A decaying mean of where tokens went."""

    def __init__(self, model: Transformer) -> None:
        self._layers = expert_layers(model)
        self._num_experts = model.spec.moe.num_experts if model.spec.moe is not None else 0
        self._offsets_L11 = self._num_experts * torch.arange(len(self._layers), device=model.embed.weight.device)
        self._offsets_L11 = self._offsets_L11[:, None, None]
        self._counts_LE = np.zeros((len(self._layers), self._num_experts))
        self._steps = 0

    def note(self, routings: Mapping[int, Routing]) -> None:
        """A step has run."""
        if self._steps % EVERY == 0 and self._layers:
            self._count(routings)
        self._steps += 1

    def _count(self, routings: Mapping[int, Routing]) -> None:
        ids_LTK = torch.stack([routings[layer].expert_ids_TK for layer in self._layers]) + self._offsets_L11
        found_LE = torch.bincount(ids_LTK.flatten(), minlength=self._counts_LE.size).cpu().numpy()
        self._counts_LE *= 0.5 ** (ids_LTK.shape[1] / HALF_LIFE)
        self._counts_LE += found_LE.reshape(self._counts_LE.shape)

    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer, what share of the tokens' choices each expert got; empty before any step, or without
        experts."""
        if not self._counts_LE.any():
            return ()
        shares_LE = self._counts_LE / self._counts_LE.sum(1, keepdims=True)
        return tuple(map(tuple, shares_LE.tolist()))
