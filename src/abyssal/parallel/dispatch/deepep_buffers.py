"""DeepEP's two buffers as one: tokens copied once a rank, and copies added up again where the tokens are.

Signatures are those of DeepEP v2.1.0 (commit dd758ca), ``deep_ep.buffers.elastic`` and ``deep_ep.buffers.legacy``.
Calls are made without their own asynchrony: the dispatcher's stream waits for them, and its thread for their counts.

Legend: T tokens, D width, K chosen experts, Q copies of tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, distributed


@dataclass(frozen=True)
class Received:
    """Copies that arrived."""

    copies: Tensor
    slots_QK: Tensor
    """Local slot of each choice that is here; -1 of the others."""
    weights_QK: Tensor
    handle: Any
    """What the library wants back."""


class CopyBuffer(Protocol):
    """What the dispatcher needs of either version."""

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, num_slots: int) -> Received: ...

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor: ...

    def combine(self, sums_QD: Tensor, weights_QK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]: ...


def open_buffer(library: Any, group: distributed.ProcessGroup, max_tokens: int, width: int, top_k: int) -> CopyBuffer:
    """The newer of the library's buffers, for tokens of up to ``width`` elements of two bytes.

    Raises:
        ValueError: a version of the library without either.
    """
    if hasattr(library, "ElasticBuffer"):
        return ElasticCopies(library, group, max_tokens, width, top_k)
    if hasattr(library, "Buffer"):
        return LegacyCopies(library, group, width)
    raise ValueError("deep_ep has neither ElasticBuffer nor Buffer: install DeepEP 1.0 or newer")


class ElasticCopies:
    """Version 2.  Its buffer is for a number of tokens a rank that all ranks share."""

    def __init__(self, library: Any, group: distributed.ProcessGroup, max_tokens: int, width: int, top_k: int) -> None:
        self._max_tokens = max_tokens = max(max_tokens, 1)
        self._buffer = library.ElasticBuffer(
            group, num_max_tokens_per_rank=max_tokens, hidden=width, num_topk=top_k, deterministic=True
        )

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, num_slots: int) -> Received:
        if len(x_TD) > self._max_tokens:
            raise ValueError(
                f"{len(x_TD)} tokens: DeepEP's buffer was opened for {self._max_tokens} a rank, the most that any had "
                "at the first dispatch; begin with the largest batch, or open the dispatcher anew"
            )
        copies, slots_QK, weights_QK, handle, _ = self._buffer.dispatch(
            x_TD, topk_idx=slots_TK, topk_weights=weights_TK, num_experts=num_slots, do_cpu_sync=True
        )
        here = slice(handle.num_recv_tokens)
        return Received(copies[here], slots_QK[here], weights_QK[here], handle)

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        copies, _, _, _, _ = self._buffer.dispatch(x_TD, num_experts=handle.num_experts, handle=handle)
        return copies[: handle.num_recv_tokens]

    def combine(self, sums_QD: Tensor, weights_QK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        sum_TD, weights_TK, _ = self._buffer.combine(sums_QD, handle, topk_weights=weights_QK)
        return sum_TD, weights_TK


class LegacyCopies:
    """Version 1.  Its buffer is for a width; tokens pass through it piece by piece."""

    def __init__(self, library: Any, group: distributed.ProcessGroup, width: int) -> None:
        ranks, width_bytes = distributed.get_world_size(group), 2 * width
        try:
            configs = library.Buffer.get_dispatch_config(ranks), library.Buffer.get_combine_config(ranks)
        except AssertionError as error:
            raise ValueError(
                f"DeepEP's Buffer does not know groups of {ranks} ranks ({error}); give another ep"
            ) from error
        self._buffer = library.Buffer(
            group,
            max(config.get_nvl_buffer_size_hint(width_bytes, ranks) for config in configs),
            max(config.get_rdma_buffer_size_hint(width_bytes, ranks) for config in configs),
        )

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, num_slots: int) -> Received:
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(slots_TK, num_slots)
        copies, slots_QK, weights_QK, _, handle, _ = self._buffer.dispatch(
            x_TD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=slots_TK,
            topk_weights=weights_TK,
        )
        return Received(copies, slots_QK, weights_QK, handle)

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        return self._buffer.dispatch(x_TD, handle=handle)[0]

    def combine(self, sums_QD: Tensor, weights_QK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        sum_TD, weights_TK, _ = self._buffer.combine(sums_QD, handle, topk_weights=weights_QK)
        return sum_TD, weights_TK
