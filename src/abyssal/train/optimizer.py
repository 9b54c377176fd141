"""AdamW as V3 trains with it: decoupled weight decay on matrices, none on norms; gradients clipped by global norm.

What moves are the FP32 master weights, on one rank the parameters themselves (``precision.linear`` casts them); the two
moments are in FP32 or, to halve them, in BF16.  Kept by name, so that a checkpoint needs no order of groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from abyssal.kernels.adamw import AdamWStep, adamw_
from abyssal.train.config import OptimizerConfig


class AdamW:
    """The optimizer of a model's trained parameters.

    Args:
        masters: what it moves, by key: whole parameters, or this rank's part of each (:mod:`abyssal.train.masters`).

    Attributes:
        means, squares: moments by the same keys.
        steps: taken so far.
    """

    def __init__(self, masters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self.means = {name: self._zeros(master) for name, master in masters.items()}
        self.squares = {name: self._zeros(master) for name, master in masters.items()}

    def _zeros(self, master: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.config.moments == "bfloat16" else master.dtype
        return torch.zeros_like(master, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)

    def step(self, masters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        """Move every master that has a gradient: matrices with weight decay, norms without."""
        self.steps += 1
        config = self.config
        for decays in (True, False):
            names = [name for name in masters if name in gradients and (masters[name].dim() >= 2) == decays]
            adamw_(
                [masters[name].data for name in names],
                [gradients[name] for name in names],
                [self.means[name] for name in names],
                [self.squares[name] for name in names],
                AdamWStep(
                    self.steps, lr, config.beta1, config.beta2, config.eps, config.weight_decay if decays else 0.0
                ),
            )


def clip_gradients(gradients: Mapping[str, Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, of the common norm ``norm``, to one of ``max_norm`` where it is above.

    Gradients within the bound are left untouched, so that most steps make one pass over them and not two.
    """
    if norm > max_norm:
        torch._foreach_mul_(list(gradients.values()), float(max_norm / (norm + 1e-6)))
