"""Multi-head latent attention, expanded and absorbed, and the grouped-query attention of the dense family.

Latent attention [V3 eq. 1–11] stores, for each token and layer, one latent c_KV and one rotary key shared by all heads:

- eq. 1–2: c_KV = W_DKV h, then RMS-normalised; the heads' keys without positions are W_UK c_KV;
- eq. 3–4: k_R = RoPE(W_KR h); a head's key is [W_UK c_KV ; k_R];
- eq. 5: the heads' values are W_UV c_KV;
- eq. 6–9: the query is made alike from its own latent c_Q, or straight from h where there is none (V2-Lite);
- eq. 10–11: softmax attention over the concatenated widths, then W_O.

*Expanded* (training, prefill) computes keys and values of every head and attends to them.  *Absorbed* (decoding) uses
(W_UK c)·q = c·(W_UKᵀ q): the query is folded into the latent space once, every head reads the same cached latents, and
W_UV is applied after the sum.  Per new token it reads C + R cached values instead of expanding H (N + V) of them per
earlier token.  Both give the same result up to rounding, and the tests hold them to it.

Each module has the two stages of the layer: ``project`` (projections, rotation, cache write) and ``attend``.

Legend: T tokens, D model, H heads, N width without and R with rotation, Q = N + R, V value width, C latent,
B sequences, S queries, L keys, X cached values of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from abyssal.kernels.attention import attention, attention_keeping
from abyssal.kernels.fp8_tiles import Quantised, quantise
from abyssal.kernels.latent_attention import latent_attention, paged_latent_attention
from abyssal.model.context import AttentionGroup, PagedGroup
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import apply_rotation, softmax_scale
from abyssal.model.step import Step
from abyssal.precision.linear import Linear, WeightQueue, grouped_linear
from abyssal.precision.operand import Activation, operand
from abyssal.precision.recipe import Recipe
from abyssal.spec.model import LATENT_NORM_EPS, GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec
from abyssal.spec.tile_format import TileFormat


def _join_kept(kept: list[Quantised | None], joined: Tensor, form: TileFormat | None) -> Quantised | None:
    """The groups' outputs as they are kept, as one; what attention did not keep so is quantised here."""
    if form is None or not torch.is_grad_enabled():
        return None
    if len(kept) == 1 and kept[0] is not None:
        return kept[0]
    return quantise(joined.detach(), form)


def _join(parts: list[Tensor], q_THQ: Tensor, width: int) -> Tensor:
    """The groups' rows (T, width) as one tensor; there is no group when a rank without tokens joins a step."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q_THQ.new_empty(0, width)


class LatentAttention(nn.Module):
    """MLA of one layer."""

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(spec.attention, LatentAttentionSpec)
        self.sizes = sizes = spec.attention
        self.scale = softmax_scale(spec)
        self.rope_interleaved = spec.rope_interleaved
        self.forgets_norms = "norm" in recipe.recompute
        self.forgets_up_projections = "up_projection" in recipe.recompute
        self.kept_output = recipe.kept_after_attention
        hidden, heads, entry = spec.hidden_size, sizes.num_heads, recipe.product
        query_width = heads * sizes.qk_head_dim
        if sizes.q_lora_rank is None:
            self.q = Linear(hidden, query_width, entry("q"), device, dtype)
        else:
            self.q_a = Linear(hidden, sizes.q_lora_rank, entry("q_a"), device, dtype)
            self.q_norm = RMSNorm(sizes.q_lora_rank, LATENT_NORM_EPS, device, dtype)
            self.q_b = Linear(sizes.q_lora_rank, query_width, entry("q_b"), device, dtype)
        self.kv_a = Linear(hidden, sizes.cache_values, entry("kv_a"), device, dtype)
        self.kv_norm = RMSNorm(sizes.kv_lora_rank, LATENT_NORM_EPS, device, dtype)
        expanded_width = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self.kv_b = Linear(sizes.kv_lora_rank, expanded_width, entry("kv_b"), device, dtype)
        self.out = Linear(heads * sizes.v_head_dim, hidden, entry("out"), device, dtype)

    def input_operand(self, h_TD: Tensor) -> Activation:
        """The layer's normalised input as the products that read it want it."""
        first = self.q if self.sizes.q_lora_rank is None else self.q_a
        return operand(h_TD, self.kv_a.entry if first.entry.fp8 is None else first.entry)

    def _query(self, h: Activation, layer: int, step: Step) -> Tensor:
        """[V3 eq. 6–9]: (T, H, Q), rotary part rotated."""
        if self.sizes.q_lora_rank is None:
            return self._up_query(self.q, h, layer, step)
        down_TC = self.q_a(h, step.queue)

        def latent() -> Activation:
            return operand(self.q_norm(down_TC), self.q_b.entry)

        latent_TC = latent()
        q_THQ = self._up_query(self.q_b, latent_TC, layer, step)
        if self.forgets_norms:
            step.forgotten.forget_activation(layer, latent_TC, latent)
        return q_THQ

    def _up_query(self, up: Linear, x: Activation, layer: int, step: Step) -> Tensor:
        if self.forgets_up_projections:
            source = up.source(x)
            step.forgotten.offer_query(layer, lambda: self._rotated(up(source()), step))
        return self._rotated(up(x, step.queue), step)

    def _rotated(self, q_TQ: Tensor, step: Step) -> Tensor:
        """The heads of the query, their rotary parts rotated: (T, H, Q)."""
        sizes = self.sizes
        q_THQ = q_TQ.view(len(q_TQ), sizes.num_heads, sizes.qk_head_dim)
        nope, rope = q_THQ.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        return torch.cat([nope, apply_rotation(rope, step.rotation)], -1)

    def project(self, h: Activation, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Query (T, H, Q) and this layer's cache entries (T, C + R): normalised latent, rotated key [V3 eq. 1, 3]."""
        latent, rope = self.kv_a(h, step.queue).split([self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim], -1)
        entries_TX = torch.cat([self.kv_norm(latent), apply_rotation(rope, step.rotation)], -1)
        return self._query(h, layer, step), step.context.write(layer, entries_TX)

    def attend(self, q_THQ: Tensor, entries_TX: Tensor, layer: int, step: Step) -> Tensor:
        """Attention output (T, D) [V3 eq. 10–11]."""
        parts: list[Tensor] = []
        kept: list[Quantised | None] = []
        for absorbed, run in groupby(step.context.groups(layer, entries_TX), lambda group: group.absorbed):
            if absorbed:
                parts.append(self._absorbed(q_THQ, list(run), step))
                kept.append(None)
                continue
            for group in run:
                assert isinstance(group, AttentionGroup)
                out, codes = self._expanded(q_THQ[group.rows], group, layer, step)
                parts.append(out)
                kept.append(codes)
        joined = _join(parts, q_THQ, self.sizes.num_heads * self.sizes.v_head_dim)
        return self.out(operand(joined, self.out.entry, _join_kept(kept, joined, self.kept_output)), step.queue)

    def _expanded(self, q: Tensor, group: AttentionGroup, layer: int, step: Step) -> tuple[Tensor, Quantised | None]:
        """Keys and values of every head from the latents [V3 eq. 2, 4, 5], then attention: (B·S, H·V), and the same as
        attention's backward keeps it where it keeps it quantised."""
        sizes, sequences = self.sizes, group.num_sequences
        latent, rope = group.entries.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1)
        x = operand(latent.contiguous(), self.kv_b.entry)
        rope = rope.contiguous().view(sequences, 1, -1, sizes.qk_rope_head_dim)
        k_BHLQ, v_BHLV = self._keys_values(x, rope, step.queue)
        q_BHSQ = self._by_head(q, sequences)
        q_BSHQ, k_BLHQ, v_BLHV = (tensor.transpose(1, 2) for tensor in (q_BHSQ, k_BHLQ, v_BHLV))
        out, kept = attention_keeping(q_BSHQ, k_BLHQ, v_BLHV, group.past, self.scale, self.kept_output)
        if self.forgets_up_projections:
            query, rows = step.forgotten.query(layer), group.rows  # the group itself would keep its entries
            source = self.kv_b.source(x)
            again = step.forgotten.shared(layer, lambda: self._keys_values(source(), rope))
            step.forgotten.forget(layer, q_BHSQ, lambda: self._by_head(query()[rows], sequences))
            step.forgotten.forget(layer, k_BHLQ, lambda: again()[0])
            step.forgotten.forget(layer, v_BHLV, lambda: again()[1])
        return out.reshape(len(q), -1), kept

    def _by_head(self, q_THQ: Tensor, sequences: int) -> Tensor:
        """(B, H, S, Q), in a storage of its own."""
        q_BSHQ = q_THQ.view(sequences, -1, self.sizes.num_heads, self.sizes.qk_head_dim)
        return q_BSHQ.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def _keys_values(
        self, latent: Activation, rope_B1LR: Tensor, queue: WeightQueue | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, H, L, Q) and (B, H, L, V), in the layout in which attention reads them."""
        sizes, sequences = self.sizes, len(rope_B1LR)
        kv = self.kv_b(latent, queue)
        kv_BLHX = kv.view(sequences, -1, sizes.num_heads, sizes.qk_nope_head_dim + sizes.v_head_dim)
        nope, v = kv_BLHX.transpose(1, 2).split([sizes.qk_nope_head_dim, sizes.v_head_dim], -1)
        return torch.cat([nope, rope_B1LR.expand(-1, sizes.num_heads, -1, -1)], -1), v.clone(
            memory_format=torch.contiguous_format
        )

    def _absorbed(self, q_THQ: Tensor, groups: Sequence[AttentionGroup | PagedGroup], step: Step) -> Tensor:
        """W_UK folded into the query, W_UV applied after the sum over latents: (rows, H·V).

        The groups' rows follow one another: their products are one, and each attends to its own entries."""
        q = q_THQ[groups[0].rows.start : groups[-1].rows.stop]
        sizes, rows, heads = self.sizes, len(q), self.sizes.num_heads
        entry, counts = self.kv_b.entry.plain, [len(q)] * self.sizes.num_heads
        kv_b_HXC = self.kv_b.effective_weight().view(heads, -1, sizes.kv_lora_rank)
        up_k_HNC, up_v_HVC = kv_b_HXC.split([sizes.qk_nope_head_dim, sizes.v_head_dim], 1)
        nope, rope = q.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        by_head = nope.transpose(0, 1).reshape(heads * rows, -1)
        folded = grouped_linear(by_head, up_k_HNC.transpose(1, 2), counts, entry, step.queue)
        q_THC = torch.cat([folded.view(heads, rows, -1).transpose(0, 1), rope], -1)
        by_group = q_THC.split([group.rows.stop - group.rows.start for group in groups])
        latents = [self._latents(q, group) for q, group in zip(by_group, groups, strict=True)]
        latent_THC = latents[0] if len(latents) == 1 else torch.cat(latents)
        by_head = latent_THC.transpose(0, 1).reshape(heads * rows, -1)
        out = grouped_linear(by_head, up_v_HVC, counts, entry, step.queue)
        return out.view(heads, rows, -1).transpose(0, 1).reshape(rows, -1)

    def _latents(self, q_THC: Tensor, group: AttentionGroup | PagedGroup) -> Tensor:
        """What each head of one group attends to, still latent: (T, H, C)."""
        sizes = self.sizes
        if isinstance(group, PagedGroup):
            return paged_latent_attention(q_THC, group.entries_PSX, group.table, sizes.kv_lora_rank, self.scale)
        q_BSHC = q_THC.view(group.num_sequences, -1, sizes.num_heads, sizes.cache_values)
        entries_BLX = group.entries.view(group.num_sequences, -1, sizes.cache_values)
        latent_BSHC = latent_attention(q_BSHC, entries_BLX, sizes.kv_lora_rank, group.past, self.scale)
        return latent_BSHC.reshape(len(q_THC), sizes.num_heads, -1)


class GroupedQueryAttention(nn.Module):
    """Attention of the dense family; a token's cache entry is its rotated keys and its values, all heads."""

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(spec.attention, GroupedQueryAttentionSpec)
        self.sizes = sizes = spec.attention
        self.scale = softmax_scale(spec)
        self.kept_output = recipe.kept_after_attention
        hidden, entry = spec.hidden_size, recipe.product
        self.q = Linear(hidden, sizes.num_heads * sizes.head_dim, entry("q"), device, dtype)
        self.k = Linear(hidden, sizes.num_kv_heads * sizes.head_dim, entry("k"), device, dtype)
        self.v = Linear(hidden, sizes.num_kv_heads * sizes.head_dim, entry("v"), device, dtype)
        self.out = Linear(sizes.num_heads * sizes.head_dim, hidden, entry("out"), device, dtype)

    def input_operand(self, h_TD: Tensor) -> Activation:
        """The layer's normalised input as the products that read it want it."""
        entries = self.q.entry, self.k.entry, self.v.entry
        return operand(h_TD, next((entry for entry in entries if entry.fp8 is not None), self.q.entry))

    def project(self, h_TD: Activation, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Rotated query (T, H, Q) and this layer's cache entries (T, 2 · KV heads · head width): keys, values."""
        sizes, rows = self.sizes, len(h_TD)
        q_THQ = apply_rotation(self.q(h_TD, step.queue).view(rows, sizes.num_heads, sizes.head_dim), step.rotation)
        k_THQ = apply_rotation(self.k(h_TD, step.queue).view(rows, sizes.num_kv_heads, sizes.head_dim), step.rotation)
        entries_TX = torch.cat([k_THQ.flatten(1), self.v(h_TD, step.queue)], -1)
        return q_THQ, step.context.write(layer, entries_TX)

    def attend(self, q_THQ: Tensor, entries_TX: Tensor, layer: int, step: Step) -> Tensor:
        """Attention output (T, D)."""
        groups = step.context.groups(layer, entries_TX)
        parts = [self._group(q_THQ[group.rows], group) for group in groups if isinstance(group, AttentionGroup)]
        joined = _join(parts, q_THQ, self.sizes.num_heads * self.sizes.head_dim)
        return self.out(operand(joined, self.out.entry, _join_kept([], joined, self.kept_output)), step.queue)

    def _group(self, q: Tensor, group: AttentionGroup) -> Tensor:
        sizes = self.sizes
        shape = (group.num_sequences, -1, sizes.num_kv_heads, sizes.head_dim)
        k_BLHQ, v_BLHQ = (part.reshape(shape) for part in group.entries.chunk(2, dim=-1))
        q_BSHQ = q.view(group.num_sequences, -1, sizes.num_heads, sizes.head_dim)
        return attention(q_BSHQ, k_BLHQ, v_BLHQ, group.past, self.scale).reshape(len(q), -1)


def build_attention(
    spec: ModelSpec, recipe: Recipe, device: torch.device | str | None, dtype: torch.dtype | None
) -> LatentAttention | GroupedQueryAttention:
    """The attention that ``spec`` describes."""
    kind = LatentAttention if isinstance(spec.attention, LatentAttentionSpec) else GroupedQueryAttention
    return kind(spec, recipe, device, dtype)
