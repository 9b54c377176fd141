"""Dispatchers between ranks, held to the dispatcher of a single rank."""

import torch
from torch import distributed

from abyssal.parallel.dispatch.choose import open_dispatcher
from abyssal.parallel.mesh import Mesh
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.placement import Placement


def roundtrip(kind, spec, slots):
    rank = distributed.get_rank()
    mesh = Mesh(spec)
    placement = Placement(max(slots) + 1, slots, spec.ep)
    dispatcher = open_dispatcher(kind, {0: placement}, mesh)
    g = torch.Generator().manual_seed(rank)
    T = 5 + rank
    ids = torch.rand(T, placement.num_experts, generator=g).argsort(1)[:, :3]
    x = torch.randn(T, 8, generator=g)
    w = torch.rand(T, 3, generator=g)
    plan = dispatcher.plan(0, ids)
    rows, ws = dispatcher.start_dispatch(x, w, plan).wait()
    assert sum(plan.counts) == len(rows)
    y, back = dispatcher.start_combine(rows, ws, plan).wait()
    assert torch.equal(back, w)
    torch.testing.assert_close(y, 3 * x)
    dispatcher.close()
    mesh.close()


def test_roundtrip(workers):
    workers(2)(roundtrip, "alltoall", MeshSpec(dp=2, ep=2), (0, 1, 2, 3))
    workers(4)(roundtrip, "alltoall", MeshSpec(dp=4, ep=2, ranks_per_node=2), (0, 1, 2, 3, 0, 1))


def test_roundtrip_hierarchical(workers):
    workers(2)(roundtrip, "hierarchical", MeshSpec(dp=2, ep=2), (0, 1, 2, 3))
    workers(4)(roundtrip, "hierarchical", MeshSpec(dp=4, ep=4, ranks_per_node=2), (0, 1, 2, 3, 0, 1, 4, 5))
    workers(4)(roundtrip, "hierarchical", MeshSpec(dp=4, ep=2, ranks_per_node=1), (0, 1, 2, 3, 0, 1))
