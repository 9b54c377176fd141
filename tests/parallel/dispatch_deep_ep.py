"""A stand-in for DeepEP on the CPU, over gloo: the signatures, checks and results of v2.1.0's two buffers.

``ELASTIC`` and ``LEGACY`` stand for a library with the newer buffer and for one from before it.  Arguments that the
library refuses are refused (dtypes, contiguity, 16 bytes at once, a handle beside indices, more tokens than the buffer
is for), and rows beyond those received are garbage, as with memory that nobody filled.

Legend: T tokens, D width, K chosen experts, R ranks, Q copies received.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

_SPARE = 3
"""Rows of garbage after what an elastic buffer received."""


def _check_rows(x_TD: Tensor) -> None:
    assert x_TD.dtype == torch.bfloat16 and x_TD.ndim == 2 and x_TD.is_contiguous()
    assert x_TD.shape[1] * x_TD.element_size() % 16 == 0


@dataclass(frozen=True)
class Layout:
    """Who gets which token."""

    group: distributed.ProcessGroup
    in_rank_TR: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, group: distributed.ProcessGroup, in_rank_TR: Tensor) -> Layout:
        sent_R = in_rank_TR.sum(0)
        received_R = torch.empty_like(sent_R)
        distributed.all_to_all_single(received_R, sent_R, group=group)
        return cls(group, in_rank_TR, sent_R.tolist(), received_R.tolist())

    def out(self, x_TD: Tensor) -> Tensor:
        copies = x_TD[self.in_rank_TR.t().nonzero()[:, 1]].view(torch.uint8)
        arrived = copies.new_empty(sum(self.received), copies.shape[1])
        distributed.all_to_all_single(arrived, copies, self.received, self.sent, group=self.group)
        return arrived.view(x_TD.dtype)

    def back(self, copies_QD: Tensor) -> Tensor:
        """Added in FP32."""
        assert len(copies_QD) == sum(self.received)
        returned = copies_QD.new_empty(sum(self.sent), copies_QD.shape[1])
        distributed.all_to_all_single(returned, copies_QD, self.sent, self.received, group=self.group)
        sums_TD = torch.zeros(len(self.in_rank_TR), copies_QD.shape[1])
        sums_TD.index_add_(0, self.in_rank_TR.t().nonzero()[:, 1], returned.float())
        return sums_TD.to(copies_QD.dtype)


def _in_rank(topk_idx: Tensor, num_experts: int, group: distributed.ProcessGroup) -> Tensor:
    ranks = distributed.get_world_size(group)
    assert num_experts % ranks == 0
    hit_TR = torch.zeros(len(topk_idx), ranks, dtype=torch.bool)
    return hit_TR.scatter_(1, topk_idx // (num_experts // ranks), True)


def _send_choices(
    layout: Layout, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, list[int]]:
    assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous() and topk_idx.ndim == 2
    assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
    assert topk_weights.shape == topk_idx.shape
    local, rank = num_experts // distributed.get_world_size(layout.group), distributed.get_rank(layout.group)
    slots_QK = layout.out(topk_idx) - rank * local
    here_QK = (slots_QK >= 0) & (slots_QK < local)
    slots_QK = slots_QK.where(here_QK, -1)
    counts = torch.bincount(slots_QK[here_QK], minlength=local).tolist()
    return slots_QK, layout.out(topk_weights).where(here_QK, 0.0), counts


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 * hidden_bytes * num_ranks


class Buffer:
    def __init__(
        self,
        group: distributed.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        assert group is not None and num_nvl_bytes > 0
        self.group, self.num_nvl_bytes = group, num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return _Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]:
        in_rank_TR = _in_rank(topk_idx, num_experts, self.group)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return in_rank_TR.sum(0).int(), None, per_expert, in_rank_TR, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Any, Any]:
        _check_rows(x)
        assert x.shape[1] * 2 * distributed.get_world_size(self.group) <= self.num_nvl_bytes
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return handle[0].out(x), None, None, None, None, None
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        assert is_token_in_rank is not None and topk_idx is not None and topk_weights is not None
        layout = Layout.of(self.group, is_token_in_rank)
        assert layout.sent == num_tokens_per_rank.tolist()
        chosen = _send_choices(layout, topk_idx, topk_weights, len(num_tokens_per_expert))
        return layout.out(x), *chosen, (layout,), None

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any]:
        _check_rows(x)
        assert topk_weights is None or topk_weights.dtype == torch.float32
        return handle[0].back(x), None if topk_weights is None else handle[0].back(topk_weights), None


class ElasticBuffer:
    def __init__(
        self,
        group: distributed.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_max_tokens_per_rank > 0 and hidden > 0 and num_topk > 0
        self.group, self.hidden, self.top_k, self.most = group, hidden, num_topk, num_max_tokens_per_rank

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Any = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any, Any]:
        _check_rows(x)
        assert num_experts is not None, "the number of SMs is computed from it"
        assert len(x) <= self.most and x.shape[1] <= self.hidden
        if handle is not None:
            assert topk_idx is None and not do_cpu_sync and num_experts == handle.num_experts
            return _with_garbage(handle.layout.out(x)), None, None, handle, None
        assert topk_idx is not None and topk_weights is not None and topk_idx.shape[1] == self.top_k
        layout = Layout.of(self.group, _in_rank(topk_idx, num_experts, self.group))
        slots_QK, weights_QK, counts = _send_choices(layout, topk_idx, topk_weights, num_experts)
        handle = SimpleNamespace(
            layout=layout,
            num_experts=num_experts,
            num_recv_tokens=sum(layout.received),
            num_recv_tokens_per_expert_list=counts,
        )
        copies, slots_QK, weights_QK = (_with_garbage(tensor) for tensor in (layout.out(x), slots_QK, weights_QK))
        return copies, slots_QK, weights_QK, handle, None

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any]:
        _check_rows(x)
        assert x.shape[1] <= self.hidden
        assert topk_weights is None or (topk_weights.dtype == torch.float32 and len(topk_weights) == len(x))
        return handle.layout.back(x), None if topk_weights is None else handle.layout.back(topk_weights), None


def _with_garbage(received: Tensor) -> Tensor:
    return torch.cat([received, received.new_full((_SPARE, *received.shape[1:]), 77)])


ELASTIC = SimpleNamespace(ElasticBuffer=ElasticBuffer, Buffer=Buffer, topk_idx_t=torch.int64)
LEGACY = SimpleNamespace(Buffer=Buffer)
