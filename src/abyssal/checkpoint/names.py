"""The one table between this package's parameters and Hugging Face's tensors, read in both directions.

Hugging Face stores one tensor for each expert and each of gate, up and down; this package stacks experts into one
parameter and fuses gate over up, so that a grouped product runs on them as they lie.  A :class:`Piece` says which
rectangle of which parameter one Hugging Face tensor is.  Loading, saving and converting walk the same list of pieces,
and :func:`check_complete` asserts that the pieces tile every parameter exactly once, so a tensor cannot be forgotten in
one direction alone.

The table also says how each tensor is stored.  FP8 checkpoints keep the embedding, the output head, the norms, the
router and the MTP projection ``eh_proj`` in BF16; the router's correction bias is FP32 in every checkpoint.  A
multi-token-prediction module k is Hugging Face's layer ``num_layers + k`` and carries copies of the embedding and of
the head, which this package shares.

Free of torch.  V3 has about 46,000 pieces; building them takes a few tenths of a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from abyssal.spec.model import GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec

Storage = Literal["block", "model", "float32"]
"""How a tensor is stored: ``block`` in 128 x 128 block-scaled FP8 where the checkpoint is FP8 and in the model's dtype
elsewhere, ``model`` always in the model's dtype (BF16 in an FP8 checkpoint), ``float32`` always in FP32."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor, and the part of one of our parameters that it is."""

    hf_name: str
    hf_shape: tuple[int, ...]
    parameter: str
    """Our parameter (or buffer)."""
    storage: Storage
    expert: int | None = None
    """Logical expert of a stacked parameter; None for a parameter that is not stacked."""
    rows: tuple[int, int] | None = None
    """First row and the row after the last, of the parameter (of the expert's matrix); None for all."""
    copy_of: str | None = None
    """The Hugging Face tensor that holds the same values, when this is a copy that our model does not hold."""
    optional: bool = False
    """May be absent, and is not written: the output head of a model whose embeddings are tied."""
    mtp: bool = False
    """Belongs to a multi-token-prediction module."""


def checkpoint_table(spec: ModelSpec, include_mtp: bool = True) -> tuple[Piece, ...]:
    """Every tensor of the model's checkpoint, in the order in which checkpoints are written."""
    return tuple(_pieces(spec, include_mtp))


def scale_name(hf_name: str) -> str:
    """The FP32 scales of a block-scaled tensor: ``weight`` has ``weight_scale_inv``."""
    return f"{hf_name}_scale_inv"


def is_derived(hf_name: str) -> bool:
    """Whether a tensor follows from the configuration (RoPE frequencies that old Llama checkpoints carry)."""
    return _DERIVED.search(hf_name) is not None


def belongs_to_mtp(hf_name: str, num_layers: int) -> bool:
    """Whether a tensor lies in a layer after the main model's ``num_layers``, where MTP modules are."""
    match = _LAYER.match(hf_name)
    return match is not None and int(match.group(1)) >= num_layers


def check_complete(pieces: Iterable[Piece], shapes: Mapping[str, Sequence[int]]) -> None:
    """Assert that the pieces and the parameters cover each other exactly.

    Every Hugging Face name is unique; every element of every parameter lies in exactly one piece that is not a copy;
    every copy has the shape of what it copies.  ``shapes`` gives our parameters with *logical* experts as the leading
    axis of stacked ones.

    Raises:
        AssertionError: naming the parameter or tensor.
    """
    hf_shapes: dict[str, tuple[int, ...]] = {}
    covered: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    copies: list[Piece] = []
    for piece in pieces:
        assert piece.hf_name not in hf_shapes, f"{piece.hf_name} is twice in the table"
        hf_shapes[piece.hf_name] = piece.hf_shape
        assert piece.parameter in shapes, f"{piece.hf_name} belongs to {piece.parameter}, which the model lacks"
        if piece.copy_of is not None:
            copies.append(piece)
            continue
        matrix = tuple(shapes[piece.parameter])[0 if piece.expert is None else 1 :]
        start, stop = piece.rows or (0, matrix[0])
        assert piece.hf_shape == (stop - start, *matrix[1:]), (
            f"{piece.hf_name} {piece.hf_shape} does not fit rows {start}:{stop} of {piece.parameter} {matrix}"
        )
        covered.setdefault((piece.parameter, piece.expert), []).append((start, stop))
    for piece in copies:
        assert hf_shapes.get(piece.copy_of or "") == piece.hf_shape, f"{piece.hf_name} copies {piece.copy_of}"
    stacked = {parameter for parameter, expert in covered if expert is not None}
    for parameter, shape in shapes.items():
        rows = shape[1 if parameter in stacked else 0]
        for expert in range(shape[0]) if parameter in stacked else (None,):
            _assert_tiles(covered.pop((parameter, expert), []), rows, parameter, expert)
    assert not covered, f"pieces beyond the experts of {next(iter(covered))}"


def _assert_tiles(ranges: list[tuple[int, int]], rows: int, parameter: str, expert: int | None) -> None:
    end = 0
    for start, stop in sorted(ranges):
        assert start == end and stop > start, (
            f"rows {end}:{start} of {parameter} (expert {expert}) overlap or are left out"
        )
        end = stop
    assert end == rows, f"rows {end}:{rows} of {parameter} (expert {expert}) are left out"


# ---- the table, from the outside in ----


def _pieces(spec: ModelSpec, include_mtp: bool) -> Iterator[Piece]:
    vocabulary = (spec.vocab_size, spec.hidden_size)
    yield Piece(EMBEDDING, vocabulary, "embed.weight", "model")
    for layer in range(spec.num_layers):
        yield from _block(spec, f"layers.{layer}", f"model.layers.{layer}", spec.is_moe_layer(layer))
    yield Piece("model.norm.weight", (spec.hidden_size,), "norm.weight", "model")
    if spec.tie_embeddings:
        yield Piece(HEAD, vocabulary, "embed.weight", "model", copy_of=EMBEDDING, optional=True)
    else:
        yield Piece(HEAD, vocabulary, "head.weight", "model")
    for depth in range(spec.mtp_depth if include_mtp else 0):
        for piece in _mtp_module(spec, f"mtp.{depth}", f"model.layers.{spec.num_layers + depth}"):
            yield replace(piece, mtp=True)


def _mtp_module(spec: ModelSpec, ours: str, theirs: str) -> Iterator[Piece]:
    hidden, vocabulary = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    yield Piece(f"{theirs}.embed_tokens.weight", vocabulary, "embed.weight", "model", copy_of=EMBEDDING)
    yield Piece(f"{theirs}.enorm.weight", (hidden,), f"{ours}.embedding_norm.weight", "model")
    yield Piece(f"{theirs}.hnorm.weight", (hidden,), f"{ours}.hidden_norm.weight", "model")
    yield Piece(f"{theirs}.eh_proj.weight", (hidden, 2 * hidden), f"{ours}.projection.weight", "model")
    yield from _block(spec, f"{ours}.block", theirs, spec.moe is not None)
    yield Piece(f"{theirs}.shared_head.norm.weight", (hidden,), f"{ours}.norm.weight", "model")
    head, parameter = (EMBEDDING, "embed.weight") if spec.tie_embeddings else (HEAD, "head.weight")
    yield Piece(f"{theirs}.shared_head.head.weight", vocabulary, parameter, "model", copy_of=head)


def _block(spec: ModelSpec, ours: str, theirs: str, is_moe: bool) -> Iterator[Piece]:
    hidden = (spec.hidden_size,)
    yield Piece(f"{theirs}.input_layernorm.weight", hidden, f"{ours}.attention_norm.weight", "model")
    if isinstance(spec.attention, LatentAttentionSpec):
        yield from _latent_attention(spec.attention, spec.hidden_size, f"{ours}.attention", f"{theirs}.self_attn")
    else:
        yield from _grouped_attention(spec.attention, spec.hidden_size, f"{ours}.attention", f"{theirs}.self_attn")
    yield Piece(f"{theirs}.post_attention_layernorm.weight", hidden, f"{ours}.ffn_norm.weight", "model")
    if is_moe:
        yield from _experts(spec, f"{ours}.ffn", f"{theirs}.mlp")
    else:
        fused = f"{ours}.ffn.gate_up.weight", f"{ours}.ffn.down.weight"
        yield from _swiglu(spec.hidden_size, spec.dense_ffn_size, *fused, f"{theirs}.mlp")


def _latent_attention(attention: LatentAttentionSpec, hidden: int, ours: str, theirs: str) -> Iterator[Piece]:
    heads, latent = attention.num_heads, attention.kv_lora_rank
    queries, query_latent = heads * attention.qk_head_dim, attention.q_lora_rank
    if query_latent is None:
        yield _linear(queries, hidden, f"{ours}.q", f"{theirs}.q_proj")
    else:
        yield _linear(query_latent, hidden, f"{ours}.q_a", f"{theirs}.q_a_proj")
        yield Piece(f"{theirs}.q_a_layernorm.weight", (query_latent,), f"{ours}.q_norm.weight", "model")
        yield _linear(queries, query_latent, f"{ours}.q_b", f"{theirs}.q_b_proj")
    yield _linear(attention.cache_values, hidden, f"{ours}.kv_a", f"{theirs}.kv_a_proj_with_mqa")
    yield Piece(f"{theirs}.kv_a_layernorm.weight", (latent,), f"{ours}.kv_norm.weight", "model")
    keys_values = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield _linear(keys_values, latent, f"{ours}.kv_b", f"{theirs}.kv_b_proj")
    yield _linear(hidden, heads * attention.v_head_dim, f"{ours}.out", f"{theirs}.o_proj")


def _grouped_attention(attention: GroupedQueryAttentionSpec, hidden: int, ours: str, theirs: str) -> Iterator[Piece]:
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    yield _linear(queries, hidden, f"{ours}.q", f"{theirs}.q_proj")
    yield _linear(keys, hidden, f"{ours}.k", f"{theirs}.k_proj")
    yield _linear(keys, hidden, f"{ours}.v", f"{theirs}.v_proj")
    yield _linear(hidden, queries, f"{ours}.out", f"{theirs}.o_proj")


def _experts(spec: ModelSpec, ours: str, theirs: str) -> Iterator[Piece]:
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None, "a mixture-of-experts layer needs spec.moe"
    yield Piece(f"{theirs}.gate.weight", (moe.num_experts, hidden), f"{ours}.router.weight", "model")
    if moe.correction_bias:
        bias = f"{theirs}.gate.e_score_correction_bias"
        yield Piece(bias, (moe.num_experts,), f"{ours}.router.bias_E", "float32")
    stacked = f"{ours}.experts.w_gate_up_EFD", f"{ours}.experts.w_down_EDF"
    for expert in range(moe.num_experts):
        yield from _swiglu(hidden, moe.expert_ffn_size, *stacked, f"{theirs}.experts.{expert}", expert)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.expert_ffn_size
        fused = f"{ours}.shared.gate_up.weight", f"{ours}.shared.down.weight"
        yield from _swiglu(hidden, width, *fused, f"{theirs}.shared_experts")


def _swiglu(
    hidden: int, width: int, gate_up: str, down: str, theirs: str, expert: int | None = None
) -> Iterator[Piece]:
    yield Piece(f"{theirs}.gate_proj.weight", (width, hidden), gate_up, "block", expert, (0, width))
    yield Piece(f"{theirs}.up_proj.weight", (width, hidden), gate_up, "block", expert, (width, 2 * width))
    yield Piece(f"{theirs}.down_proj.weight", (hidden, width), down, "block", expert)


def _linear(rows: int, columns: int, ours: str, theirs: str) -> Piece:
    return Piece(f"{theirs}.weight", (rows, columns), f"{ours}.weight", "block")
