"""AdamW as V3 trains with it: decoupled weight decay on matrices, none on norms; gradients clipped by global norm.

torch's fused implementation walks each parameter once a step, where the default makes a dozen passes; on CPU that is
most of its cost.  The trade-off not taken: moments in BF16 [V3 section 3.3.3], which this optimizer cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from abyssal.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups: those with two axes or more decay, norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``max_norm``; the norm that they had before.

    Gradients within the bound are left untouched, so that most steps make one pass over them and not two.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not norm <= max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm
