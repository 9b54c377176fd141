"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight a feature."""

    def __init__(
        self, size: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)
