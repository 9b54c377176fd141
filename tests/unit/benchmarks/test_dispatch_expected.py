"""What has to travel, on a token small enough to follow by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.dispatch_parts.expected import hierarchical_copies, plain_copies
from benchmarks.dispatch_parts.setting import Setting


class OneToken(Setting):
    """Only rank 0 has a token: its experts are on its own rank, its neighbour, and both ranks of the other node."""

    def expert_ids(self, rank: int) -> Tensor:
        return torch.tensor([[0, 2, 4, 5, 6]] if rank == 0 else []).view(-1, 5)


SETTING = OneToken(nodes=2, ranks_per_node=2, kept_nodes=2, tokens=1, hidden=256, experts=8, top_k=5)


def test_plain_sends_a_copy_for_each_choice() -> None:
    copies = plain_copies(SETTING)
    assert copies.rows == {"stayed": 1, "inside": 1, "across": 3} and copies.weights == copies.rows


def test_hierarchical_crosses_once_and_goes_on_inside() -> None:
    copies = hierarchical_copies(SETTING)
    # First hop: to itself and to rank 2.  Second: to ranks 0 and 1 here, and there to ranks 2 and 3.
    assert copies.rows == {"stayed": 1 + 2, "inside": 2, "across": 1}
    # Weights of 2 choices stay and 3 cross; then those of ranks 0 (1) and 2 (2) stay, of ranks 1 and 3 go inside.
    assert copies.weights == {"stayed": 2 + 3, "inside": 2, "across": 3}


def test_bytes_are_fp8_with_scales_there_and_bf16_back() -> None:
    copies = hierarchical_copies(SETTING)
    assert copies.dispatch_bytes(SETTING)["across"] == 256 + 2 + 3 * 4
    assert copies.combine_bytes(SETTING)["across"] == 256 * 2
