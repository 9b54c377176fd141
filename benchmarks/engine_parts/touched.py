"""How many bytes and FLOPs a step needs at least: which experts its tokens choose, and what they read.

Legend: B sequences, T tokens, L layers with experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abyssal.spec import arithmetic
from abyssal.spec.model import ModelSpec


def distinct_experts(experts_TLK: Sequence[np.ndarray], first: int) -> float:
    """Experts that a step of several sequences touches, over all layers: the mean over steps.

    Args:
        experts_TLK: the choices of each sequence's tokens.
        first: token that the first step computed; each later token is a step.
    """
    steps = min(len(experts) for experts in experts_TLK) - first
    if steps < 1:
        raise ValueError(f"first: {first} leaves no token of the shortest sequence")
    together_TLK = np.concatenate([experts[first : first + steps] for experts in experts_TLK], axis=2)
    distinct = [len(set(row.tolist())) for step_LK in together_TLK for row in step_LK]
    return sum(distinct) / steps


def expert_elements(spec: ModelSpec) -> int:
    """Weights of one routed expert."""
    return 0 if spec.moe is None else 3 * spec.hidden_size * spec.moe.expert_ffn_size


def decode_bytes(spec: ModelSpec, experts: float, batch: int, context: int, itemsize: int) -> float:
    """Bytes that one step of decoding reads: each weight that any of its tokens uses once, and every cache entry.

    Args:
        experts: routed experts touched, over all layers (:func:`distinct_experts`).
        context: positions that each of ``batch`` tokens attends to.
        itemsize: bytes of a weight and of a cached value.
    """
    chosen = spec.num_moe_layers * (0 if spec.moe is None else spec.moe.top_k)
    weights = spec.active_parameters_without_embedding + (experts - chosen) * expert_elements(spec)
    cached = arithmetic.kv_cache_bytes_per_token(spec, bytes_per_value=itemsize) * batch * context
    return weights * itemsize + cached


def decode_flops(spec: ModelSpec, batch: int, context: int) -> int:
    """FLOPs of one step, attention absorbed."""
    return batch * arithmetic.decode_flops_per_token(spec, context)
