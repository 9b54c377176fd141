"""Causal attention over groups of equal-shaped sequences.

The definition is :func:`attention_reference`: scores, mask, softmax in FP32 (FP64 for FP64), weighted sum.  Without
gradients CPU takes ``kernels/prefill_attention.py``, whose result for a query depends on nothing but what it sees.
Otherwise torch's fused kernel has it.  On CPU that kernel wants equal widths of keys and values and falls back to
writing out the scores if they differ, so the narrower side is padded with zeros, which changes no result.
Training on CPU takes ``kernels/causal_attention.py``.

Legend: B sequences, S queries, L keys, H heads, Q width of queries and keys, V width of values.
Error bound: the fast form within 2^-22 · L of the reference relative to the largest value in FP32 and 2^-7 in BF16;
in FP64 within 1e-12.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels.causal_attention import causal_attention, causal_attention_keeping, fits
from abyssal.kernels.fp8_tiles import Quantised
from abyssal.kernels.prefill_attention import prefill_attention
from abyssal.spec.tile_format import TileFormat


def causal_mask(num_queries: int, num_keys: int, past: int, device: torch.device) -> Tensor:
    """(S, L) boolean: query i sees keys 0 .. past + i."""
    keys = torch.arange(num_keys, device=device)
    return keys <= torch.arange(past, past + num_queries, device=device)[:, None]


def attention_reference(q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor, past: int, scale: float) -> Tensor:
    """softmax(q kᵀ · scale, causal) v, written out.  Returns (B, S, H, V) in the dtype of ``v``."""
    wide = torch.promote_types(q_BSHQ.dtype, torch.float32)
    scores = torch.einsum("bshq,blhq->bhsl", q_BSHQ.to(wide), k_BLHQ.to(wide)) * scale
    mask = causal_mask(q_BSHQ.shape[1], k_BLHQ.shape[1], past, q_BSHQ.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhsl,blhv->bshv", weights, v_BLHV.to(wide)).to(v_BLHV.dtype)


def _trains_on_cpu(q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor) -> bool:
    """Whether gradients are wanted of whole sequences on CPU, each query head with keys of its own."""
    batch, length, heads, _ = q_BSHQ.shape
    return (
        q_BSHQ.is_cpu
        and torch.is_grad_enabled()
        and (q_BSHQ.requires_grad or k_BLHQ.requires_grad or v_BLHV.requires_grad)
        and k_BLHQ.shape[1:3] == (length, heads)
        and fits(batch * heads, length, q_BSHQ.itemsize)
    )


def attention(q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor, past: int, scale: float) -> Tensor:
    """Causal attention; query i of a sequence sees keys 0 .. past + i.

    Keys and values may have fewer heads than queries (grouped-query attention): consecutive query heads share one.
    Returns (B, S, H, V).
    """
    if past == 0 and _trains_on_cpu(q_BSHQ, k_BLHQ, v_BLHV):
        return causal_attention(q_BSHQ, k_BLHQ, v_BLHV, scale)
    seen = past + q_BSHQ.shape[1]  # no query sees the keys after the last query's own
    k_BLHQ, v_BLHV = k_BLHQ[:, :seen], v_BLHV[:, :seen]
    out_BSHV = prefill_attention(q_BSHQ, k_BLHQ, v_BLHV, scale)
    return _attention(q_BSHQ, k_BLHQ, v_BLHV, past, scale) if out_BSHV is None else out_BSHV


def attention_keeping(
    q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor, past: int, scale: float, form: TileFormat | None
) -> tuple[Tensor, Quantised | None]:
    """:func:`attention`, and the same as its backward keeps it: (B·S, H·V) in ``form``, whose heads lie side by side.

    None where the backward keeps the result as it is: without a form, and where torch's kernel has it.
    """
    if form is None or past or not _trains_on_cpu(q_BSHQ, k_BLHQ, v_BLHV):
        return attention(q_BSHQ, k_BLHQ, v_BLHV, past, scale), None
    return causal_attention_keeping(q_BSHQ, k_BLHQ, v_BLHV, scale, form)


def _attention(q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor, past: int, scale: float) -> Tensor:
    """By torch's fused kernel."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BSHQ, k_BLHQ, v_BLHV))
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if width > value_dim:
        v = F.pad(v, (0, width - value_dim))
    elif width > q.shape[-1]:
        q, k = F.pad(q, (0, width - q.shape[-1])), F.pad(k, (0, width - k.shape[-1]))
    num_queries, num_keys = q.shape[2], k.shape[2]
    grouped = k.shape[1] != q.shape[1]
    if num_queries == num_keys and past == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        mask = None if num_queries == 1 else causal_mask(num_queries, num_keys, past, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[..., :value_dim].transpose(1, 2)
