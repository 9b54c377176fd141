"""The tensors of a model as a table: part, shape, how many there are, how many a token passes.

Everything that :mod:`abyssal.spec.arithmetic` counts (parameters, FLOPs, bytes in each format) is a sum over this one
table, so the figures cannot disagree with each other.  Shapes are those of a Hugging Face checkpoint (gate and up
projections apart, one tensor an expert), because block scales of FP8 are rounded up for each stored tensor.

Linears are ``(out, in)``.  ``D`` hidden, ``H`` heads, ``F`` FFN width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

from abyssal.spec.parts import GroupedQueryAttentionSpec, LatentAttentionSpec, MoESpec

if TYPE_CHECKING:
    from abyssal.spec.model import ModelSpec

Part = Literal[
    "embedding",
    "mtp_projection",
    "attention",
    "dense_ffn",
    "router",
    "shared_experts",
    "routed_experts",
    "norms",
    "head",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts in the order in which they are shown."""


@dataclass(frozen=True)
class TensorGroup:
    """``copies`` tensors of one shape in one part of the model."""

    part: Part
    shape: tuple[int, ...]
    copies: int = 1
    active_copies: int = 1
    """Copies that one token passes; fewer than ``copies`` for routed experts alone."""
    fp8: bool = False
    """Stored with 128x128 block scales in an FP8 checkpoint (embedding, head, gate, norms, eh_proj are not)."""
    fp32: bool = False
    """Kept in FP32 in every format (the router's correction bias), and moved by a rule, not by gradients."""

    @property
    def elements(self) -> int:
        return prod(self.shape) * self.copies

    @property
    def active_elements(self) -> int:
        return prod(self.shape) * self.active_copies

    def times(self, count: int) -> TensorGroup:
        return replace(self, copies=self.copies * count, active_copies=self.active_copies * count)


def _latent_attention(attention: LatentAttentionSpec, hidden_size: int) -> Iterator[TensorGroup]:
    heads, latent = attention.num_heads, attention.kv_lora_rank
    query_in = hidden_size
    if attention.q_lora_rank is not None:
        query_in = attention.q_lora_rank
        yield TensorGroup("attention", (query_in, hidden_size), fp8=True)
        yield TensorGroup("norms", (query_in,))
    yield TensorGroup("attention", (heads * attention.qk_head_dim, query_in), fp8=True)
    yield TensorGroup("attention", (latent + attention.qk_rope_head_dim, hidden_size), fp8=True)
    yield TensorGroup("norms", (latent,))
    yield TensorGroup("attention", (heads * (attention.qk_nope_head_dim + attention.v_head_dim), latent), fp8=True)
    yield TensorGroup("attention", (hidden_size, heads * attention.v_head_dim), fp8=True)


def _grouped_query_attention(attention: GroupedQueryAttentionSpec, hidden_size: int) -> Iterator[TensorGroup]:
    query, key_value = (count * attention.head_dim for count in (attention.num_heads, attention.num_kv_heads))
    yield TensorGroup("attention", (query, hidden_size), fp8=True)
    yield TensorGroup("attention", (key_value, hidden_size), fp8=True).times(2)
    yield TensorGroup("attention", (hidden_size, query), fp8=True)


def _ffn(part: Part, hidden_size: int, width: int) -> Iterator[TensorGroup]:
    yield TensorGroup(part, (width, hidden_size), fp8=True).times(2)
    yield TensorGroup(part, (hidden_size, width), fp8=True)


def _experts(moe: MoESpec, hidden_size: int) -> Iterator[TensorGroup]:
    yield TensorGroup("router", (moe.num_experts, hidden_size))
    if moe.correction_bias:
        yield TensorGroup("router", (moe.num_experts,), fp32=True)
    if moe.num_shared_experts:
        yield from _ffn("shared_experts", hidden_size, moe.num_shared_experts * moe.expert_ffn_size)
    for group in _ffn("routed_experts", hidden_size, moe.expert_ffn_size):
        yield replace(group, copies=group.copies * moe.num_experts, active_copies=group.copies * moe.top_k)


def block_tensors(spec: ModelSpec, moe: MoESpec | None) -> Iterator[TensorGroup]:
    """One transformer block: two norms, attention, and a dense FFN or the experts of ``moe``."""
    if isinstance(spec.attention, LatentAttentionSpec):
        yield from _latent_attention(spec.attention, spec.hidden_size)
    else:
        yield from _grouped_query_attention(spec.attention, spec.hidden_size)
    if moe is None:
        yield from _ffn("dense_ffn", spec.hidden_size, spec.dense_ffn_size)
    else:
        yield from _experts(moe, spec.hidden_size)
    yield TensorGroup("norms", (spec.hidden_size,)).times(2)


def main_tensors(spec: ModelSpec) -> Iterator[TensorGroup]:
    """The main model: embedding, blocks, final norm, and the head unless it is the embedding."""
    yield TensorGroup("embedding", (spec.vocab_size, spec.hidden_size))
    num_dense = spec.num_layers - spec.num_moe_layers
    for count, moe in ((num_dense, None), (spec.num_moe_layers, spec.moe)):
        if count:
            yield from (group.times(count) for group in block_tensors(spec, moe))
    yield TensorGroup("norms", (spec.hidden_size,))
    if not spec.tie_embeddings:
        yield TensorGroup("head", (spec.vocab_size, spec.hidden_size))


def mtp_tensors(spec: ModelSpec) -> Iterator[TensorGroup]:
    """The MTP modules (V3 report section 2.2): projection, three norms, a block each; embedding and head shared."""
    if spec.mtp_depth:
        yield TensorGroup("mtp_projection", (spec.hidden_size, 2 * spec.hidden_size)).times(spec.mtp_depth)
        yield TensorGroup("norms", (spec.hidden_size,)).times(3 * spec.mtp_depth)
        yield from (group.times(spec.mtp_depth) for group in block_tensors(spec, spec.moe))
