"""A whole layer of decoding in one native call: latent attention over pages and feed-forward, all experts here.

The definition is the row of stages of ``model/block.py``; ``csrc/layer.cpp`` calls the very operators that the stages
call one by one, so the results have the same bits.  At one token a layer is some forty operators of a few microseconds,
and the way to each through Python costs as much again.

Legend: T tokens, D model, E experts, K chosen experts, P pages, S entries of a page, X values of an entry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.kernels.latent_attention import PageTable
from abyssal.kernels.native import DTYPE_CODES, OK, native_library, openmp_fork

_pack_step = struct.Struct("=20q").pack  # `LayerStep` of csrc/layer.h
_pack_weights = struct.Struct("=q" + 4 * "3qd" + "20q6qd" + "20qq6qd").pack  # `LayerWeights`


@dataclass(frozen=True)
class LayerTensors:
    """The weights of a layer; None where it has none.  All contiguous, on CPU, in FP32 or BF16."""

    attention_norm_D: Tensor
    kv_norm_C: Tensor
    ffn_norm_D: Tensor
    q_b: Tensor
    """Makes the query from its latent, or from the hidden state where there is no ``q_a``."""
    kv_a: Tensor
    kv_b: Tensor
    out: Tensor
    q_a: Tensor | None = None
    q_norm: Tensor | None = None
    shared_gate_up: Tensor | None = None
    """Of the shared experts, or of a dense layer."""
    shared_down: Tensor | None = None
    router_ED: Tensor | None = None
    """None in a dense layer."""
    bias_E: Tensor | None = None
    w_gate_up_EFD: Tensor | None = None
    w_down_EDF: Tensor | None = None


@dataclass(frozen=True)
class LayerSizes:
    """The numbers of a layer."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    interleaved: bool
    softmax_scale: float
    norm_eps: float
    latent_norm_eps: float
    num_experts: int = 0
    top_k: int = 0
    num_groups: int = 1
    num_kept_groups: int = 1
    softmax: bool = False
    renormalise: bool = False
    route_scale: float = 1.0


@dataclass(frozen=True)
class LayerPages:
    """Where the step's tokens leave their entries in one layer, and what they see."""

    entries_PSX: Tensor
    slots_T: Tensor
    """int64: row of the layer that each token writes, counted in entries from the first page's first."""
    table: PageTable


def _matrix(weight: Tensor | None) -> tuple[int, int, int, int]:
    if weight is None:
        return 0, 0, 0, 0
    return weight.data_ptr(), DTYPE_CODES[weight.dtype], weight.shape[-2], weight.shape[-1]


def _norm(weight: Tensor | None, eps: float) -> tuple[int, int, int, float]:
    return (0, 0, 0, eps) if weight is None else (weight.data_ptr(), DTYPE_CODES[weight.dtype], len(weight), eps)


def weights_record(tensors: LayerTensors, sizes: LayerSizes, dtype: torch.dtype) -> bytes:
    """What :func:`layer` reads in every step.  It holds addresses: the caller keeps the tensors as they are."""
    t, s = tensors, sizes
    return _pack_weights(
        DTYPE_CODES[dtype],
        *_norm(t.attention_norm_D, s.norm_eps),
        *_norm(t.q_norm, s.latent_norm_eps),
        *_norm(t.kv_norm_C, s.latent_norm_eps),
        *_norm(t.ffn_norm_D, s.norm_eps),
        *(value for weight in (t.q_a, t.q_b, t.kv_a, t.kv_b, t.out) for value in _matrix(weight)),
        *(s.num_heads, s.nope_dim, s.rope_dim, s.value_dim, s.latent_dim, int(s.interleaved), s.softmax_scale),
        *(
            value
            for weight in (t.shared_gate_up, t.shared_down, t.router_ED, t.w_gate_up_EFD, t.w_down_EDF)
            for value in _matrix(weight)
        ),
        0 if t.bias_E is None else t.bias_E.data_ptr(),
        *(s.num_experts, s.top_k, s.num_groups, s.num_kept_groups, int(s.softmax), int(s.renormalise)),
        s.route_scale,
    )


def layer(
    weights: bytes, sizes: LayerSizes, x_TD: Tensor, turns: Tensor, pages: LayerPages, *, isa_limit: int = -1
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The layer's output (T, D), and its routing unless it is dense: expert ids and weights (T, K), scores (T, E).

    Args:
        weights: of :func:`weights_record`, for the dtype of ``x_TD``.
        x_TD: contiguous, on CPU, of one token or more.
        turns: (T, R/2) complex FP32, contiguous.
        pages: entries in the dtype of ``x_TD``; the tokens' own are written.
        isa_limit: the strongest instruction set to use, an index into ``native.ISA_NAMES``; negative: the best.
    """
    library = native_library()
    assert library is not None
    tokens, table, entries_PSX = len(x_TD), pages.table, pages.entries_PSX
    y_TD, routing, pointers = torch.empty_like(x_TD), None, (0, 0, 0)
    if sizes.num_experts:
        scores_TE = x_TD.new_empty((tokens, sizes.num_experts), dtype=torch.float32)
        weights_TK = x_TD.new_empty((tokens, sizes.top_k), dtype=torch.float32)
        ids_TK = x_TD.new_empty((tokens, sizes.top_k), dtype=torch.int64)
        routing, pointers = (
            (ids_TK, weights_TK, scores_TE),
            (scores_TE.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()),
        )
    num_pages, page_tokens, _ = entries_PSX.shape
    page_stride, stride, _ = entries_PSX.stride()
    step = _pack_step(
        x_TD.data_ptr(),
        y_TD.data_ptr(),
        turns.data_ptr(),
        pages.slots_T.data_ptr(),
        entries_PSX.data_ptr(),
        table.sequences_B3.data_ptr(),
        table.pages_N.data_ptr(),
        *pointers,
        *(tokens, len(table.sequences_B3), len(table.pages_N), num_pages, page_tokens, page_stride, stride),
        *(torch.get_num_threads(), openmp_fork(), isa_limit),
    )
    status = library.abyssal_layer(step + weights)
    assert status == OK, f"abyssal_layer returned {status}"
    return y_TD, routing
