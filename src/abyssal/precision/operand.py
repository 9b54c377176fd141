"""An activation on its way into matrix products: as it is, or quantised once for all the products that read it.

What a product multiplies and what its backward keeps are different things: the values of the tiles, which are gone
after the forward, and codes with scales, which stay.  :func:`operand` makes both from an activation when the product's
recipe is FP8, and hands it through otherwise, so that a model may call it without looking.

On a processor without FP8 products the values are ordinary numbers: in BF16 where that is exact (E4M3 and E5M2 with
power-of-two scales) and multiplied fast, else in FP32.  Either way they are the values of the same bytes.

Legend: T tokens or rows, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised, quantise, quantise_with_values
from abyssal.kernels.matmul import multiplies_bf16
from abyssal.precision.recipe import LinearEntry, ProductFormats
from abyssal.spec.tile_format import TileFormat

Remade = Callable[[TileFormat, Sequence[int] | None], Tensor]
"""Makes an activation again from what others keep: its FP32 values in tiles over the rows of each group."""


@dataclass(frozen=True)
class Operand:
    """A quantised activation (T, I)."""

    handle: Tensor
    """The activation, for its gradient and for products that are not in FP8."""
    codes: Quantised
    """As Fprop reads it."""
    values: Tensor
    """Of the codes."""
    kept: Quantised | Remade
    """What the backward keeps, in place of the activation: codes, often those of Fprop, or a way to make it again."""

    def __len__(self) -> int:
        return len(self.handle)


Activation = Tensor | Operand
"""What goes into a product."""


def values_dtype(dtype: torch.dtype, *forms: TileFormat) -> torch.dtype:
    """The dtype in which values of ``forms`` are multiplied, for activations in ``dtype``."""
    exact = all(form.scale == "ue8m0" for form in forms)
    return torch.bfloat16 if exact and dtype is torch.bfloat16 and multiplies_bf16() else torch.float32


def operand(x_TI: Activation, entry: LinearEntry, kept: Quantised | None = None) -> Activation:
    """``x_TI`` as the products of ``entry`` read it: quantised where they are in FP8.

    Args:
        kept: what the backward keeps, where it is made already.
    """
    formats = entry.fp8
    if formats is None:
        return plain(x_TI)
    if isinstance(x_TI, Operand):
        return x_TI
    codes, values = quantise_with_values(x_TI.detach(), formats.input, product_dtype(x_TI, formats))
    if kept is None:
        kept = codes if formats.kept == formats.input else quantise(x_TI.detach(), formats.kept)
    return Operand(x_TI, codes, values, kept)


def received(x_TI: Tensor, codes: Quantised, entry: LinearEntry) -> Activation:
    """The operand of an activation that arrived quantised, of which ``x_TI`` holds the values."""
    formats = entry.fp8
    if formats is None or codes.form != formats.input:
        return operand(x_TI, entry)
    return Operand(x_TI, codes, codes.values(product_dtype(x_TI, formats)), codes)


def product_dtype(x_TI: Tensor, formats: ProductFormats) -> torch.dtype:
    """The dtype of the operands of Fprop and Dgrad."""
    return values_dtype(x_TI.dtype, formats.input, formats.weight, formats.gradient)


def kept_source(x_TI: Activation, keeps_handle: bool = False) -> Callable[[], Activation]:
    """What gives ``x_TI`` again without keeping alive more of it than the backward keeps.

    Args:
        keeps_handle: whether the backward keeps the activation itself as well, for a product that is not in FP8.
    """
    if not isinstance(x_TI, Operand) or not isinstance(x_TI.kept, Quantised):
        return lambda: x_TI
    kept, dtype, values = x_TI.kept, x_TI.handle.dtype, x_TI.values.dtype
    handle = x_TI.handle.detach() if keeps_handle else None
    return lambda: Operand(kept.values(dtype) if handle is None else handle, kept, kept.values(values), kept)


def plain(x_TI: Activation) -> Tensor:
    """The activation in its own dtype."""
    return x_TI.handle if isinstance(x_TI, Operand) else x_TI
