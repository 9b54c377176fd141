"""From logits to a token.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ``ValueError`` for values outside their range, naming the field."""
    if not 0.0 <= temperature <= 100.0:
        raise ValueError(f"temperature: {temperature} must lie in 0..100 (0 is greedy)")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: {top_p} must lie in (0, 1] (1 keeps the whole vocabulary)")


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """Draw one token: greedy at temperature 0, else from the smallest set of tokens whose probability reaches
    ``top_p`` (nucleus sampling, Holtzman et al. 2020), at ``temperature``.  Computed in FP32."""
    if temperature == 0.0:
        return int(logits_V.argmax())
    below_V = logits_V.float() - logits_V.max()  # at most 0, so that a tiny temperature does not overflow
    probabilities_V = (below_V / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1.0:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        outside_V = sorted_V.cumsum(-1) - sorted_V >= top_p
        probabilities_V[order_V[outside_V]] = 0.0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
