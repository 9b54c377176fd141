"""Dispatchers between ranks, held to the dispatcher of a single rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from abyssal.kernels.fp8_tiles import quantise
from abyssal.model.dispatch import combine, dispatch, start_dispatch
from abyssal.parallel.dispatch.choose import DispatcherKind, RankDispatcher, open_dispatcher
from abyssal.parallel.dispatch.hierarchical import HierarchicalDispatcher
from abyssal.parallel.dispatch.lane import CommunicationError
from abyssal.parallel.mesh import Mesh
from abyssal.precision.wire import bytes_per_token, pack
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat
from tests.parallel.dispatch_cases import LAYER, WIDTH, Batch, draw, expert, total, whole
from tests.support.worker_pool import WorkerFailure

KINDS: tuple[DispatcherKind, ...] = ("alltoall", "hierarchical")
ROUTINGS = ("random", "one expert", "few experts", "repeated", "empty ranks", "no tokens")
BOUNDS = {torch.float64: 1e-14, torch.float32: 12 * 2.0**-24, torch.bfloat16: 4.1 * 2.0**-8}
"""Of a hierarchical sum, over the sum of its summands' sizes: three roundings, the local one, and another order."""

WIRE = TileFormat(code="e4m3", scale="ue8m0")
MESHES = [
    MeshSpec(dp=1),
    MeshSpec(dp=2, ep=2),
    MeshSpec(dp=2, ep=2, ranks_per_node=1),
    MeshSpec(dp=4, ep=4, ranks_per_node=2),
    MeshSpec(dp=4, ep=2, ranks_per_node=4),
]
SLOW_MESHES = [MeshSpec(dp=8, ep=8, ranks_per_node=2), MeshSpec(dp=8, ep=4, ranks_per_node=2)]


def placements(ep: int) -> list[Placement]:
    """Each expert once but out of order, and some with replicas on other ranks."""
    experts = tuple(reversed(range(max(2 * ep, 4))))
    replicas = tuple(slot % 3 for slot in range(ep))
    return [Placement(len(experts), experts, ep), Placement(len(experts), experts + replicas, ep)]


def check_against_one_rank(spec: MeshSpec) -> None:
    mesh = Mesh(spec)
    for case, placement in enumerate(placements(spec.ep)):
        for kind in KINDS:
            dispatcher = open_dispatcher(kind, {LAYER: placement}, mesh, chunk_tokens=(None, 2)[case])
            for seed, routing in enumerate(ROUTINGS):
                for dtype, bound in BOUNDS.items():
                    batch = draw(placement, routing, dtype, seed, mesh.place.replica)
                    _compare(batch, dispatcher, mesh, 0.0 if kind == "alltoall" else bound)
            dispatcher.close()
    mesh.close()


def _compare(batch: Batch, dispatcher: RankDispatcher, mesh: Mesh, bound: float) -> None:
    rank, one = mesh.place.expert, whole(batch)
    own_rows, own_tokens = one.rows(batch, rank), batch.tokens(rank)
    plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
    rows_AD, weights_A = dispatcher.start_dispatch(batch.x_TD[rank], batch.weights_TK[rank], plan).wait()
    assert weights_A is not None
    assert list(plan.counts) == [one.plan.counts[slot] for slot in batch.placement.slots_of_rank(rank)]
    assert torch.equal(rows_AD, one.rows_AD[own_rows]) and torch.equal(weights_A, one.weights_A[own_rows])

    y_TD, back_TK = dispatcher.start_combine(expert(rows_AD, weights_A), weights_A, plan).wait()
    all_rows_AD = expert(one.rows_AD, one.weights_A)
    expected_TD, _ = one.dispatcher.start_combine(all_rows_AD, None, one.plan).wait()
    sizes_TD, _ = one.dispatcher.start_combine(all_rows_AD.double().abs(), None, one.plan).wait()
    assert back_TK is not None and torch.equal(back_TK, batch.weights_TK[rank])
    assert y_TD.dtype is expected_TD.dtype and y_TD.shape == batch.x_TD[rank].shape
    difference_TD = (y_TD.double() - expected_TD[own_tokens].double()).abs()
    assert bool((difference_TD <= bound * sizes_TD[own_tokens]).all())


@pytest.mark.parametrize(
    "spec",
    [*MESHES, *(pytest.param(spec, marks=pytest.mark.slow) for spec in SLOW_MESHES)],
    ids=lambda spec: f"{spec},nodes={spec.num_nodes}",
)
def test_rows_weights_and_sums_are_those_of_one_rank(workers, spec: MeshSpec) -> None:
    workers(spec.world_size, timeout=180)(check_against_one_rank, spec)


def check_unit_weights(spec: MeshSpec) -> None:
    """Dispatch and then combine is K times the identity, exactly: the K summands of a token are equal."""
    mesh, generator = Mesh(spec), torch.Generator().manual_seed(distributed.get_rank())
    for kind in KINDS:
        dispatcher = open_dispatcher(kind, {LAYER: placements(spec.ep)[1]}, mesh, chunk_tokens=2)
        for choices in (1, 2, 4):
            x_TD = torch.randint(-99, 99, (5, WIDTH), generator=generator).to(torch.float32)
            ids_TK = torch.rand(5, 8, generator=generator).argsort(1)[:, :choices]
            plan = dispatcher.plan(LAYER, ids_TK)
            rows_AD, _ = dispatcher.start_dispatch(x_TD, None, plan).wait()
            assert torch.equal(dispatcher.start_combine(rows_AD, None, plan).wait()[0], choices * x_TD)
        dispatcher.close()
    mesh.close()


def check_adjoint(spec: MeshSpec) -> None:
    """<dispatch(x, w), (y, v)> is <(x, w), combine(y, v)> over all ranks, and so is what autograd makes of it."""
    mesh, placement = Mesh(spec), placements(spec.ep)[1]
    rank, group = mesh.place.expert, mesh.experts
    for kind in KINDS:
        dispatcher = open_dispatcher(kind, {LAYER: placement}, mesh, chunk_tokens=2)
        batch = draw(placement, "random", torch.float64, 7, mesh.place.replica)
        x_TD, weights_TK = batch.x_TD[rank].requires_grad_(), batch.weights_TK[rank].double().requires_grad_()
        plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
        rows = dispatch(x_TD, weights_TK, plan, dispatcher)
        assert rows.weights_A is not None
        y_AD, v_A = torch.randn_like(rows.values_AD), torch.randn_like(rows.weights_A)
        there = total((rows.values_AD * y_AD).sum() + (rows.weights_A * v_A).sum(), group)
        (rows.values_AD * y_AD).sum().add((rows.weights_A * v_A).sum()).backward()
        sum_TD, back_TK = dispatcher.start_combine(y_AD, v_A, plan).wait()
        assert back_TK is not None and x_TD.grad is not None and weights_TK.grad is not None
        assert torch.equal(x_TD.grad, sum_TD) and torch.equal(weights_TK.grad, back_TK)
        here = total((x_TD * sum_TD).sum() + (weights_TK * back_TK).sum(), group)
        assert there == pytest.approx(here, rel=1e-12)

        leaf_AD = y_AD.clone().requires_grad_()
        z_TD = torch.randn_like(x_TD)
        (combine(leaf_AD, plan, dispatcher) * z_TD).sum().backward()
        assert leaf_AD.grad is not None
        assert torch.equal(leaf_AD.grad, dispatcher.start_dispatch(z_TD, None, plan).wait()[0])
        dispatcher.close()
    mesh.close()


def check_chunks(spec: MeshSpec) -> None:
    """However many tokens cross at once, and though ranks have different numbers of them: the same bits."""
    mesh, placement = Mesh(spec), placements(spec.ep)[1]
    batch = draw(placement, "random", torch.bfloat16, 11, mesh.place.replica)
    rank, found, messages = mesh.place.expert, [], []
    for chunk_tokens in (100, 1, 2, 3):
        dispatcher = open_dispatcher("hierarchical", {LAYER: placement}, mesh, chunk_tokens)
        plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
        rows_AD, weights_A = dispatcher.start_dispatch(batch.x_TD[rank], batch.weights_TK[rank], plan).wait()
        assert weights_A is not None
        found.append((rows_AD, weights_A, dispatcher.start_combine(expert(rows_AD, weights_A), None, plan).wait()[0]))
        messages.append(dispatcher.traffic.dispatch.messages)
        dispatcher.close()
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert len({len(ids) for ids in batch.ids_TK}) > 1 and messages[0] < messages[3] < messages[1]
    mesh.close()


def check_measured(spec: MeshSpec) -> None:
    """Tokens enough to be cut find one size for all ranks; nothing of the trials is counted, and nothing changes."""
    mesh, placement = Mesh(spec), Placement.identity(8, 4)
    generator = torch.Generator().manual_seed(mesh.rank)
    given = open_dispatcher("hierarchical", {LAYER: placement}, mesh, 1000)
    measured = HierarchicalDispatcher({LAYER: placement}, mesh)
    both: list[RankDispatcher] = [given, measured]
    for tokens in (3, 150 + 10 * mesh.rank, 150 + 10 * mesh.rank):
        ids_TK = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :3]
        x_TD = torch.randint(-99, 99, (tokens, WIDTH), generator=generator).float()
        sent = []
        for dispatcher in both:
            plan = dispatcher.plan(LAYER, ids_TK)
            rows_AD, _ = dispatcher.start_dispatch(x_TD, None, plan).wait()
            assert torch.equal(dispatcher.start_combine(rows_AD, None, plan).wait()[0], 3 * x_TD)
            sent.append((rows_AD, dispatcher.traffic.dispatch.across, dispatcher.traffic.combine.across))
        assert torch.equal(sent[0][0], sent[1][0]) and sent[0][1:] == sent[1][1:]
        assert (measured.chunk_size is None) == (tokens == 3)
    assert measured.chunk_size is not None
    assert list(measured.chunk_size.seconds) == [180, 90]
    sizes: list[object] = [None] * 4
    distributed.all_gather_object(sizes, measured.chunk_size)
    assert sizes == [measured.chunk_size] * 4
    given.close()
    measured.close()
    mesh.close()


@pytest.mark.parametrize("check", [check_unit_weights, check_adjoint, check_chunks, check_measured])
def test_identity_adjoint_and_chunks(workers, check: Callable[[MeshSpec], None]) -> None:
    workers(4)(check, MeshSpec(dp=4, ep=4, ranks_per_node=2))


def check_bytes(spec: MeshSpec, wire: TileFormat | None) -> None:
    """What was counted is what a count made from the routing alone gives, for tokens in FP8 or BF16."""
    mesh, placement, width = Mesh(spec), placements(spec.ep)[1], 256
    rank, nodes = mesh.place.expert, [mesh.spec.node_of(peer) for peer in range(spec.ep)]
    batch = draw(placement, "random", torch.bfloat16, 13, width=width)
    x_TD, weights_TK = batch.x_TD[rank], batch.weights_TK[rank]
    size = 2 * width if wire is None else bytes_per_token(width, wire)
    for kind in KINDS:
        dispatcher = open_dispatcher(kind, {LAYER: placement}, mesh, chunk_tokens=2)
        plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
        rows = start_dispatch(dispatcher, x_TD, weights_TK, plan, wire).wait()
        if wire is not None:
            assert rows.codes is not None
            one, codes = whole(batch), pack(quantise(torch.cat(batch.x_TD), wire))
            sent = one.dispatcher.start_dispatch(codes, None, one.plan).wait()[0][one.rows(batch, rank)]
            assert torch.equal(pack(rows.codes), sent)
        dispatcher.start_combine(rows.values_AD, None, plan).wait()
        copies = expected_copies(batch, kind, nodes)
        across, inside = copies_sent(copies, rank, nodes)
        crossing, handed = choices_sent(batch, kind, rank, nodes)
        traffic = dispatcher.traffic
        assert traffic.dispatch.across == across * size + crossing * 4
        assert traffic.dispatch.inside == inside * size + handed * 4
        back_across, back_inside = copies_sent([(target, source) for source, target in copies], rank, nodes)
        assert (traffic.combine.across, traffic.combine.inside) == (back_across * 2 * width, back_inside * 2 * width)
        assert traffic.dispatch.messages > 0 and traffic.plan.across > 0
        traffic.reset()
        assert traffic.dispatch.across == traffic.plan.inside == traffic.combine.messages == 0
        dispatcher.close()
    mesh.close()


def expected_copies(batch: Batch, kind: str, nodes: list[int]) -> list[tuple[int, int]]:
    """(source, target) of every row that goes from rank to rank, counted token by token."""
    copies = []
    on_node = nodes.count(nodes[0])
    for source in range(len(nodes)):
        for slots in batch.slots_TK(source).tolist():
            targets = [batch.placement.rank_of_slot(slot) for slot in slots]
            if kind == "alltoall":
                copies += [(source, target) for target in targets]
                continue
            for node in {nodes[target] for target in targets}:
                hand = node * on_node + source % on_node
                copies.append((source, hand))
                copies += [(hand, target) for target in set(targets) if nodes[target] == node]
    return copies


def copies_sent(copies: list[tuple[int, int]], rank: int, nodes: list[int]) -> tuple[int, int]:
    """Across nodes and inside the node, by ``rank``."""
    mine = [target for source, target in copies if source == rank and target != rank]
    return sum(nodes[to] != nodes[rank] for to in mine), sum(nodes[to] == nodes[rank] for to in mine)


def choices_sent(batch: Batch, kind: str, rank: int, nodes: list[int]) -> tuple[int, int]:
    """Weights that ``rank`` sends across and inside: one a choice and hop."""
    on_node = nodes.count(nodes[0])
    hops = []
    for source in range(len(nodes)):
        for slot in batch.slots_TK(source).flatten().tolist():
            target = batch.placement.rank_of_slot(slot)
            hand = nodes[target] * on_node + source % on_node
            hops += [(source, target)] if kind == "alltoall" else [(source, hand), (hand, target)]
    return copies_sent(hops, rank, nodes)


@pytest.mark.parametrize("wire", [None, WIRE], ids=["bf16", "fp8"])
def test_bytes_by_link_are_those_of_the_routing_and_a_token_crosses_once_a_node(workers, wire) -> None:
    workers(4)(check_bytes, MeshSpec(dp=4, ep=4, ranks_per_node=2), wire)


def check_hierarchical_crosses_less() -> None:
    mesh = Mesh(MeshSpec(dp=4, ep=4, ranks_per_node=2))
    ids_TK = torch.tensor([[0, 1, 2, 3]]).expand(6, 4)  # all four on the first node
    across = {}
    for kind in KINDS:
        dispatcher = open_dispatcher(kind, {LAYER: Placement.identity(8, 4)}, mesh)
        plan = dispatcher.plan(LAYER, ids_TK)
        rows_AD, _ = dispatcher.start_dispatch(torch.ones(6, WIDTH), None, plan).wait()
        dispatcher.start_combine(rows_AD, None, plan).wait()
        across[kind] = dispatcher.traffic.dispatch.across, dispatcher.traffic.combine.across
        dispatcher.close()
    second = mesh.place.node == 1
    once = 6 * WIDTH * 4
    assert across["alltoall"] == ((4 * once, 0) if second else (0, 4 * once))
    assert across["hierarchical"] == ((once, 0) if second else (0, once))
    mesh.close()


def test_four_experts_on_one_node_cost_one_crossing(workers) -> None:
    workers(4)(check_hierarchical_crosses_less)


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody made {path.name}"
        time.sleep(0.005)


def check_starts_return_and_work_goes_on(kind: DispatcherKind, folder: Path) -> None:
    """Rank 0 starts two layers before any other takes part; then the others finish while it waits for nothing."""
    mesh = Mesh(MeshSpec(dp=4, ep=4, ranks_per_node=2))
    rank, placement = mesh.rank, Placement.identity(8, 4)
    dispatcher = open_dispatcher(kind, {LAYER: placement, LAYER + 1: placement}, mesh, chunk_tokens=2)
    started, finished = folder / "started", folder / f"finished-{rank}"
    if rank:
        wait_for_file(started)
    ids_TK = torch.arange(8).expand(3, 8)
    plans = [dispatcher.plan(layer, ids_TK) for layer in (LAYER, LAYER + 1)]
    x_TD = torch.full((3, WIDTH), float(rank))
    handles = [dispatcher.start_dispatch(x_TD + layer, None, plan) for layer, plan in enumerate(plans)]
    started.touch()
    if rank == 0:
        for other in (1, 2, 3):
            wait_for_file(folder / f"finished-{other}")
    for layer, (handle, plan) in enumerate(zip(handles, plans, strict=True)):
        rows_AD, expected = handle.wait()[0], torch.arange(4.0).repeat_interleave(3).repeat(2) + layer
        assert torch.equal(rows_AD[:, 0], expected) and list(plan.counts) == [12, 12]
        assert handle.wait()[0] is rows_AD  # a handle may be waited for again
    finished.touch()
    dispatcher.close()
    mesh.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_returns_before_others_take_part_and_goes_on_without_a_wait(workers, tmp_path, kind) -> None:
    workers(4)(check_starts_return_and_work_goes_on, kind, tmp_path)


def check_new_placement(kind: DispatcherKind) -> None:
    """A plan made before keeps its own placement; one made after has the new one."""
    mesh, rank = Mesh(MeshSpec(dp=2, ep=2)), distributed.get_rank()
    before, after = Placement.identity(4, 2), Placement(4, (2, 3, 0, 1), 2)
    dispatcher = open_dispatcher(kind, {LAYER: before}, mesh)
    ids_TK, x_TD = torch.tensor([[0], [0], [3]]), torch.full((3, WIDTH), float(rank))
    old = dispatcher.plan(LAYER, ids_TK)
    dispatcher.place({LAYER: after})
    new = dispatcher.plan(LAYER, ids_TK)
    assert dispatcher.placements == {LAYER: after}
    assert len(dispatcher.start_dispatch(x_TD, None, old).wait()[0]) == (4, 2)[rank]
    assert len(dispatcher.start_dispatch(x_TD, None, new).wait()[0]) == (2, 4)[rank]
    assert (list(old.counts), list(new.counts)) == (([4, 0], [0, 2]) if rank == 0 else ([0, 2], [4, 0]))
    with pytest.raises(ValueError, match=r"placement of layer 3 is over 4 ranks and the expert group has 2"):
        dispatcher.place({LAYER: Placement.identity(4, 4)})
    with pytest.raises(ValueError, match=r"tokens: 4 were given and the plan is for 3"):
        dispatcher.start_dispatch(torch.ones(4, WIDTH), None, new)
    with pytest.raises(ValueError, match=r"rows: 1 were given and the plan is for"):
        dispatcher.start_combine(torch.ones(1, WIDTH), None, new)
    dispatcher.close()
    with pytest.raises(CommunicationError, match="closed"):
        dispatcher.plan(LAYER, ids_TK)
    mesh.close()


@pytest.mark.parametrize("kind", KINDS)
def test_placements_change_between_plans_and_bad_input_is_refused(workers, kind) -> None:
    workers(2)(check_new_placement, kind)


def check_disagreement(kind: DispatcherKind) -> None:
    """A rank with another placement is found out by all, and what was queued after it is not done."""
    mesh, rank = Mesh(MeshSpec(dp=2, ep=2, ranks_per_node=1)), distributed.get_rank()
    slots = (0, 1, 2, 3) if rank else (1, 0, 2, 3)
    dispatcher = open_dispatcher(kind, {LAYER: Placement(4, slots, 2)}, mesh)
    plan = dispatcher.plan(LAYER, torch.tensor([[0]]))
    handle = dispatcher.start_dispatch(torch.ones(1, WIDTH), None, plan)
    with pytest.raises(CommunicationError, match=rf"plan of layer 3: peers \[{1 - rank}\] of the group are not at"):
        _ = plan.counts
    with pytest.raises(CommunicationError, match=r"dispatch of layer 3: not done, because before it: plan of layer 3"):
        handle.wait()
    dispatcher.close()
    mesh.close()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_plan_different_things_are_told(workers, kind) -> None:
    workers(2)(check_disagreement, kind)


def dispatch_to_a_dead_peer(folder: Path) -> None:
    mesh, rank = Mesh(MeshSpec(dp=2, ep=2)), distributed.get_rank()
    dispatcher = open_dispatcher("alltoall", {LAYER: Placement.identity(4, 2)}, mesh)
    plan = dispatcher.plan(LAYER, torch.arange(4)[None])
    assert list(plan.counts) == [2, 2]
    if rank == 1:
        os._exit(7)
    try:
        dispatcher.start_dispatch(torch.ones(1, WIDTH), None, plan).wait()
    except CommunicationError as error:
        (folder / "error").write_text(str(error))
        raise


def test_a_peer_that_dies_is_an_error_that_says_what_was_being_done(workers, tmp_path) -> None:
    with pytest.raises(WorkerFailure, match="exit code 7"):
        workers(2)(dispatch_to_a_dead_peer, tmp_path)
    assert (tmp_path / "error").read_text().startswith("dispatch of layer 3: ")
