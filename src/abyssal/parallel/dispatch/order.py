"""Small index functions that the dispatchers share.

Legend: A rows, I items.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sorting(keys_I: Tensor, bound: int) -> Tensor:
    """The stable order of keys from 0 to below ``bound``.  Short keys are sorted several times as fast."""
    if keys_I.is_cpu:
        keys_I = keys_I.to(torch.uint8 if bound <= 2**8 else torch.int16 if bound <= 2**15 else torch.int32)
    return keys_I.argsort(stable=True)


def inverse(order_A: Tensor) -> Tensor:
    """The permutation that undoes ``order_A``."""
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    return inverse_A


def runs(values_I: Tensor, lengths_I: Tensor) -> Tensor:
    """Each value as often as its length says, one after another."""
    return values_I.repeat_interleave(lengths_I)


def take(rows_AD: Tensor, weights_A: Tensor | None, index_A: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows and weights in another order."""
    return rows_AD.index_select(0, index_A), None if weights_A is None else weights_A.index_select(0, index_A)
