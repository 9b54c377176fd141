"""Gradients that several ranks share out: the exchange that gloo does and the kernel that NCCL has give the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed

from abyssal.parallel.bucket import Bucket
from abyssal.parallel.matrix import Matrix
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.waiting import Waiting
from abyssal.spec.mesh import MeshSpec
from tests.support.worker_pool import WorkerPool

MATRICES = [Matrix("wide", (5, 3)), Matrix("missing", (2, 2)), Matrix("norm", (4,)), Matrix("short", (1, 7))]


def _gradients(rank: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(matrix.shape, generator=generator, dtype=torch.float64) for matrix in MATRICES]
    return [
        None if matrix.parameter == "missing" and rank else one for matrix, one in zip(MATRICES, drawn, strict=True)
    ]


def _reduced(by_kernel: bool) -> tuple[dict[str, Tensor], bool]:
    mesh = Mesh(MeshSpec.parse(f"dp={distributed.get_world_size()}"))
    try:

        def make(device: str) -> Bucket:
            return Bucket(MATRICES, mesh.data, torch.float64, torch.float64, torch.device(device), Waiting())

        bucket = make("cpu")
        assert not bucket._by_kernel
        bucket._by_kernel = by_kernel
        bucket.start_reduce(_gradients(mesh.rank))
        return bucket.finish_reduce(), make("cuda")._by_kernel
    finally:
        mesh.close()


@pytest.mark.parametrize("by_kernel", [False, True])
def test_each_rank_has_its_rows_of_the_sums(by_kernel: bool, workers: WorkerPool) -> None:
    given = [_gradients(rank) for rank in range(3)]
    found = workers(3)(_reduced, by_kernel)
    for index, matrix in enumerate(MATRICES):
        parts = [one[index] for one in given]
        total = torch.stack([part for part in parts if part is not None]).sum(0)
        rows = torch.cat([ours[matrix.key] for ours, _ in found])
        torch.testing.assert_close(rows, total, rtol=1e-12, atol=1e-14)
    assert all(on_gpu for _, on_gpu in found), "GPUs have the kernel"
