"""Sizes and costs of a model from its spec alone: parameters, cache, FLOPs, memory.

Conventions.  A parameter is an element of the module tree: every weight plus the routers' correction biases (buffers
there, but stored in every checkpoint), so :func:`total_parameters` is what the module holds and what a checkpoint
without MTP stores.  One multiply-add is two FLOPs, and only matrix products are counted: training is
``6 (N_active - N_embedding)`` plus causal attention at half the square ("Insights into DeepSeek-V3", arXiv 2505.09343,
table 2: 250 GFLOPs a token), where N_active - N_embedding is :func:`active_parameters_without_embedding`, the matrices
that one token is multiplied by.  Norms and biases, 1.0M parameters in DeepSeek-V3, are in the totals but not in that
figure, and a tied embedding is in it, as the head that it is.  Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from abyssal.spec.parts import LatentAttentionSpec
from abyssal.spec.tensors import PARTS, Part, TensorGroup, main_tensors, mtp_tensors

if TYPE_CHECKING:
    from abyssal.spec.model import ModelSpec

WeightFormat = Literal["bf16", "fp8", "fp32"]
FP8_BLOCK = 128


def _by_part(groups: Iterable[TensorGroup], active: bool) -> dict[Part, int]:
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for group in groups:
        counts[group.part] += group.active_elements if active else group.elements
    return {part: count for part, count in counts.items() if count}


def _matrix_elements(groups: Iterable[TensorGroup]) -> int:
    return sum(group.active_elements for group in groups if len(group.shape) == 2 and group.part != "embedding")


def _head_parameters(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def parameters_by_part(spec: ModelSpec, *, active: bool = False) -> dict[Part, int]:
    """Parameters of the main model by part; with ``active`` only those that one token passes."""
    return _by_part(main_tensors(spec), active)


def mtp_parameters_by_part(spec: ModelSpec, *, active: bool = False) -> dict[Part, int]:
    """Parameters of the MTP modules by part (empty without MTP); shared embedding and head are not counted."""
    return _by_part(mtp_tensors(spec), active)


def total_parameters(spec: ModelSpec) -> int:
    """Parameters of the main model (DeepSeek-V3: 671.03B)."""
    return sum(parameters_by_part(spec).values())


def active_parameters(spec: ModelSpec) -> int:
    """Parameters of the main model that one token passes, the whole embedding included (DeepSeek-V3: 37.55B)."""
    return sum(parameters_by_part(spec, active=True).values())


def active_parameters_without_embedding(spec: ModelSpec) -> int:
    """Elements of the matrices that one token is multiplied by (DeepSeek-V3: 36.62B); norms and biases are none."""
    tied_head = _head_parameters(spec) if spec.tie_embeddings else 0
    return _matrix_elements(main_tensors(spec)) + tied_head


def mtp_parameters(spec: ModelSpec) -> int:
    """Parameters of all MTP modules (DeepSeek-V3: 11.61B)."""
    return sum(mtp_parameters_by_part(spec).values())


def kv_cache_bytes_per_token(
    spec: ModelSpec, *, bytes_per_value: int = 2, include_mtp: bool = False, fp8: bool = False
) -> int:
    """Bytes that one token occupies in the cache, over the main layers or those and the MTP modules' too.

    ``fp8``: in FP8 pages with their scales (DeepSeek-V3: 656 bytes a layer), whatever ``bytes_per_value``.
    """
    layers = spec.num_layers + (spec.mtp_depth if include_mtp else 0)
    attention = spec.attention
    return layers * (attention.fp8_entry.num_bytes if fp8 else attention.cache_values * bytes_per_value)


def _attention_flops(spec: ModelSpec, layers: int, positions: float) -> int:
    """Forward FLOPs of one token's scores and values over ``positions`` keys in each of ``layers`` layers."""
    return round(2 * layers * spec.attention.num_heads * spec.attention.score_dims * positions)


def training_flops_per_token(
    spec: ModelSpec, seq_len: int = 4096, *, include_mtp: bool = False, causal: bool = True
) -> int:
    """FLOPs of one token's forward and backward pass in a sequence of ``seq_len`` tokens.

    DeepSeek-V3 at 4096: 250.45 G; ``include_mtp`` adds 9.7 G of products (its block, projection and the head once more)
    and 0.5 G of attention.  Recomputation is not counted.  Not ``causal`` counts the whole square of scores.
    """
    positions = seq_len / 2 if causal else seq_len
    flops = 6 * active_parameters_without_embedding(spec) + 3 * _attention_flops(spec, spec.num_layers, positions)
    if include_mtp:
        flops += 6 * (_matrix_elements(mtp_tensors(spec)) + spec.mtp_depth * _head_parameters(spec))
        flops += 3 * _attention_flops(spec, spec.mtp_depth, positions)
    return flops


def prefill_flops_per_token(spec: ModelSpec, seq_len: int, *, all_logits: bool = False) -> int:
    """Mean FLOPs a token of processing a prompt of ``seq_len`` tokens, expanded attention, causal.

    A server needs the head at the last position alone; ``all_logits`` counts it at every one.
    """
    flops = 2 * active_parameters_without_embedding(spec) + _attention_flops(spec, spec.num_layers, seq_len / 2)
    return flops if all_logits else flops - 2 * _head_parameters(spec) * (seq_len - 1) // seq_len


def decode_flops_per_token(spec: ModelSpec, context_len: int, *, absorbed: bool = True) -> int:
    """FLOPs of generating one token that attends to ``context_len`` positions, itself included.

    MLA decodes absorbed: scores and values are taken over the cached latent, and folding W_UK and W_UV into query and
    output costs exactly the ``kv_b`` product they replace.  Not ``absorbed``: every cached latent is expanded again to
    keys and values, the cost that absorption avoids.  Grouped-query attention has one form.
    """
    flops = 2 * active_parameters_without_embedding(spec)
    attention = spec.attention
    if not isinstance(attention, LatentAttentionSpec):
        return flops + _attention_flops(spec, spec.num_layers, context_len)
    if absorbed:
        return flops + 2 * spec.num_layers * attention.num_heads * attention.absorbed_score_dims * context_len
    expanded_a_token = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    expansion = 2 * spec.num_layers * expanded_a_token * attention.kv_lora_rank * (context_len - 1)
    return flops + expansion + _attention_flops(spec, spec.num_layers, context_len)


def _stored_bytes(group: TensorGroup, weight_format: WeightFormat) -> int:
    if group.fp32 or weight_format == "fp32":
        return 4 * group.elements
    if weight_format == "bf16" or not group.fp8:
        return 2 * group.elements
    rows, columns = (-(-size // FP8_BLOCK) for size in group.shape)
    return group.elements + 4 * rows * columns * group.copies


def weight_bytes(spec: ModelSpec, weight_format: WeightFormat = "bf16", *, include_mtp: bool = False) -> int:
    """Bytes of the weights in BF16, in FP32, or in DeepSeek's FP8 (E4M3 with one FP32 scale a 128x128 block).

    FP8 leaves embedding, head, norms, gate and ``eh_proj`` in BF16.  A published repository is larger by the copies of
    embedding and head that its MTP layers carry.
    """
    groups = [*main_tensors(spec), *(mtp_tensors(spec) if include_mtp else ())]
    return sum(_stored_bytes(group, weight_format) for group in groups)


def training_state_bytes(
    spec: ModelSpec,
    *,
    weight_bytes: int = 2,
    master_bytes: int = 4,
    gradient_bytes: int = 4,
    moment_bytes: int = 4,
    include_mtp: bool = True,
) -> int:
    """Bytes of weights, FP32 master copy, accumulated gradients and Adam's two moments, over all ranks, unsharded.

    DeepSeek-V3 keeps the moments in BF16 (``moment_bytes=2``).  Activations are not part of it.
    """
    per_parameter = weight_bytes + master_bytes + gradient_bytes + 2 * moment_bytes
    groups = [*main_tensors(spec), *(mtp_tensors(spec) if include_mtp else ())]
    return sum(group.elements * (4 if group.fp32 else per_parameter) for group in groups)
