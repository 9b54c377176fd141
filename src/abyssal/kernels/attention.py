"""Causal attention over groups of equal-shaped sequences.

The definition is :func:`attention_reference`: scores, mask, softmax in FP32 (FP64 for FP64), weighted sum.  The fast
form hands the same problem to torch's fused kernel.  On CPU that kernel wants equal widths of keys and values and
falls back to writing out the scores otherwise, so the narrower side is padded with zeros, which changes no result.

Legend: B sequences, S queries, L keys, H heads, Q width of queries and keys, V width of values.
Error bound: the fast form within 2^-22 · L of the reference relative to the largest value in FP32 and 2^-7 in BF16;
in FP64 within 1e-12.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attention(q_BSHQ: Tensor, k_BLHQ: Tensor, v_BLHV: Tensor, past: int, scale: float) -> Tensor:
    """Causal attention; query i of a sequence sees keys 0 .. past + i.

    Keys and values may have fewer heads than queries (grouped-query attention): consecutive query heads share one.
    Returns (B, S, H, V).
    """
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


def latent_attention(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, past: int, scale: float) -> Tensor:
    """Absorbed latent attention: every head reads the same cached entries, whose first ``value_dim`` values are also
    what it sums.  ``q`` holds the query folded into the latent space, then its rotary part.

    Returns (B, S, H, value_dim): the attended latent of each head.  Scores and softmax are in FP32 at least.
    """
    batch, num_queries, heads, width = q_BSHC.shape
    wide = torch.promote_types(q_BSHC.dtype, torch.float32)
    rows = q_BSHC.reshape(batch, num_queries * heads, width)
    scores = (rows @ latent_BLC.transpose(1, 2)).to(wide).mul_(scale)
    if num_queries > 1:
        mask = causal_mask(num_queries, latent_BLC.shape[1], past, rows.device).repeat_interleave(heads, 0)
        scores = scores.masked_fill_(~mask, float("-inf"))
    weights = scores.softmax(-1).to(q_BSHC.dtype)
    return (weights @ latent_BLC[..., :value_dim]).view(batch, num_queries, heads, value_dim)
