"""The output head and its cross-entropy in one operator, a few hundred rows at a time.

Logits of a whole batch in FP32 are the largest tensor of a training step (tokens × vocabulary), and nothing needs them
but their own gradient.  So each chunk of rows computes its logits, its losses and, at once, the gradients of the rows
and of the head, and forgets the logits.  The trade-off: the head's weight gradient cannot be put off to a queue.

Legend: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.matmul import matmul
from abyssal.precision.linear import gradient_dtype, operand_dtype
from abyssal.precision.recipe import LinearEntry

CHUNK_ROWS = 256
"""Rows whose logits are in memory at once: large enough for full matmul speed, 8 MB of FP32 at vocabulary 8192."""

SMALLEST_PROBABILITY = 1e-30
"""Above FP32's subnormal numbers with room to spare."""


def _losses_and_probabilities(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row, and the softmax it was read from, in FP32 at least.

    One softmax is a quarter of the time of log-sum-exp, subtraction and exponential.  A target whose probability is too
    small for a logarithm to be exact is rare, and is computed again from its logits.
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    probabilities_TV = logits_TV.softmax(-1, dtype=wide)
    chosen_T = probabilities_TV.gather(1, targets_T[:, None]).squeeze(1)
    losses_T = -chosen_T.log()
    small = chosen_T < SMALLEST_PROBABILITY
    if small.any():
        exact_TV = logits_TV[small].log_softmax(-1, dtype=wide)
        losses_T[small] = -exact_TV.gather(1, targets_T[small][:, None]).squeeze(1)
    return losses_T, probabilities_TV


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            targets = targets_T[rows]
            losses, dlogits = _losses_and_probabilities(matmul(hidden[rows], weight.t()), targets)
            total += losses.sum()
            dlogits[torch.arange(len(targets), device=targets.device), targets] -= 1.0
            operand = dlogits.to(dtype)
            matmul(operand, weight, out=dhidden[rows])
            if dweight is None:
                continue
            if dtype == wide:
                dweight.addmm_(operand.t(), hidden[rows])
            else:
                dweight += matmul(operand.t(), hidden[rows])
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = hidden_TD.dtype, gradient_dtype(weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        scale = gradients[0]
        dweight = None if dweight is None else dweight.mul_(scale).to(ctx.dtypes[1])  # None: the head is frozen
        return (dhidden * scale).to(ctx.dtypes[0]), dweight, None, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, entry: LinearEntry) -> Tensor:
    """Sum over tokens of −log softmax(hidden weightᵀ)[target], with gradients of hidden and weight.

    The result may be used in one backward only.
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, operand_dtype(hidden_TD, entry))  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, entry: LinearEntry) -> tuple[Tensor, Tensor]:
    """Without gradients: each token's negative log-likelihood (T,) in FP32 at least, and its most likely id (T,)."""
    dtype = operand_dtype(hidden_TD, entry)
    losses, best = [], []
    for start in range(0, max(1, len(hidden_TD)), CHUNK_ROWS):  # no rows are a chunk of none
        rows = slice(start, start + CHUNK_ROWS)
        logits = matmul(hidden_TD[rows].to(dtype), weight_VD.to(dtype).t())
        losses.append(_losses_and_probabilities(logits, targets_T[rows])[0])
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)
