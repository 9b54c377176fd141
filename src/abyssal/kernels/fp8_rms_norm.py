"""RMSNorm that leaves its result quantised: what a product in FP8 reads [V3 section 3.3].

The norm is that of :mod:`~abyssal.kernels.rms_norm`, rounded to the activations' dtype as if it were stored (the router
and adapters read it so), and then quantised.  So fusing changes the speed and no byte.

Legend: T rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, quantise_with_values
from abyssal.kernels.rms_norm import rms_norm
from abyssal.spec.tile_format import TileFormat


def rms_norm_quantised(
    x_TD: Tensor, weight_D: Tensor, eps: float, form: TileFormat, dtype: torch.dtype
) -> tuple[Quantised, Tensor]:
    """The normalised rows in ``1x128`` tiles of ``form``, and their values in ``dtype``."""
    return quantise_with_values(rms_norm(x_TD, weight_D, eps), form, dtype)
