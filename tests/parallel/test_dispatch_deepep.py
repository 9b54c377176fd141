"""The dispatcher over DeepEP, on a stand-in with the library's signatures and checks."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from abyssal.kernels.fp8_tiles import quantise
from abyssal.model.dispatch import start_dispatch
from abyssal.parallel.dispatch.choose import open_dispatcher
from abyssal.parallel.dispatch.deepep import DeepEPDispatcher, load_deep_ep
from abyssal.parallel.dispatch.lane import CommunicationError
from abyssal.parallel.mesh import Mesh
from abyssal.precision.wire import pack
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat
from tests.parallel.dispatch_cases import LAYER, Batch, draw, expert, whole
from tests.parallel.dispatch_deep_ep import ELASTIC, LEGACY

LIBRARIES = {"elastic": ELASTIC, "legacy": LEGACY}
BOUND = 3.1 * 2.0**-8
"""Of a sum of BF16, over the sum of its summands' sizes: rounded at the experts' rank, at home and locally."""


def placement(ep: int) -> Placement:
    return Placement(2 * ep, (*reversed(range(2 * ep)), *(slot % 3 for slot in range(ep))), ep)


def check_against_one_rank(name: str, routing: str, width: int) -> None:
    mesh = Mesh(MeshSpec(dp=4, ep=4, ranks_per_node=2))
    dispatcher = DeepEPDispatcher({LAYER: placement(4)}, mesh, LIBRARIES[name])
    batch = draw(placement(4), routing, torch.bfloat16, 3, width=width)
    rank, one = mesh.place.expert, whole(batch)
    plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
    rows_AD, weights_A = dispatcher.start_dispatch(batch.x_TD[rank], batch.weights_TK[rank], plan).wait()
    assert weights_A is not None
    own = one.rows(batch, rank)
    assert list(plan.counts) == [one.plan.counts[slot] for slot in batch.placement.slots_of_rank(rank)]
    assert torch.equal(rows_AD, one.rows_AD[own]) and torch.equal(weights_A, one.weights_A[own])
    if width % 8 == 0:
        _check_combine(dispatcher, plan, batch, rank, rows_AD, weights_A)
    dispatcher.close()
    mesh.close()


def _check_combine(dispatcher, plan, batch: Batch, rank: int, rows_AD, weights_A) -> None:
    one, tokens = whole(batch), batch.tokens(rank)
    y_TD, back_TK = dispatcher.start_combine(expert(rows_AD, weights_A), weights_A, plan).wait()
    assert torch.equal(back_TK, batch.weights_TK[rank])
    every_AD = expert(one.rows_AD, one.weights_A)
    expected_TD = one.dispatcher.start_combine(every_AD, None, one.plan).wait()[0][tokens].double()
    sizes_TD = one.dispatcher.start_combine(every_AD.double().abs(), None, one.plan).wait()[0][tokens]
    assert bool(((y_TD.double() - expected_TD).abs() <= BOUND * sizes_TD).all())
    z_TD = torch.cat([x_TD * 2 for x_TD in batch.x_TD])
    again_AD, none = dispatcher.start_dispatch(z_TD[tokens], None, plan).wait()
    expected_AD = one.dispatcher.start_dispatch(z_TD, None, one.plan).wait()[0][one.rows(batch, rank)]
    assert none is None and torch.equal(again_AD, expected_AD)
    copies = sum(plan.arrival.copies_R)
    size = batch.x_TD[rank].shape[1] * 2
    combined, dispatched = dispatcher.traffic.combine, dispatcher.traffic.dispatch
    assert combined.stayed + combined.inside + combined.across == copies * size
    assert dispatched.stayed + dispatched.inside + dispatched.across == 2 * copies * size


@pytest.mark.parametrize("name", LIBRARIES)
def test_rows_weights_and_sums_are_those_of_one_rank(workers, name: str) -> None:
    for routing in ("random", "repeated", "empty ranks", "no tokens"):
        workers(4)(check_against_one_rank, name, routing, 16)
    workers(4)(check_against_one_rank, name, "random", 9)  # 18 bytes travel as 32


def check_fp8(name: str) -> None:
    mesh, wire = Mesh(MeshSpec(dp=2, ep=2)), TileFormat(code="e4m3", scale="ue8m0")
    dispatcher = DeepEPDispatcher({LAYER: placement(2)}, mesh, LIBRARIES[name])
    batch = draw(placement(2), "random", torch.bfloat16, 5, width=200)
    rank, one = mesh.place.expert, whole(batch)
    plan = dispatcher.plan(LAYER, batch.ids_TK[rank])
    rows = start_dispatch(dispatcher, batch.x_TD[rank], batch.weights_TK[rank], plan, wire).wait()
    codes = pack(quantise(torch.cat(batch.x_TD), wire))
    expected = one.dispatcher.start_dispatch(codes, None, one.plan).wait()[0][one.rows(batch, rank)]
    assert rows.codes is not None and torch.equal(pack(rows.codes), expected)
    # Room was made for bytes; what comes back is BF16, twice as wide.
    assert dispatcher.start_combine(rows.values_AD, None, plan).wait()[0].shape == batch.x_TD[rank].shape
    dispatcher.close()
    mesh.close()


@pytest.mark.parametrize("name", LIBRARIES)
def test_fp8_travels_as_the_bytes_it_was_quantised_to(workers, name: str) -> None:
    workers(2)(check_fp8, name)


def check_refusals() -> None:
    mesh = Mesh(MeshSpec(dp=2, ep=2))
    dispatcher = DeepEPDispatcher({LAYER: placement(2)}, mesh, ELASTIC)
    ids_TK, x_TD = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 16, dtype=torch.bfloat16)
    plan = dispatcher.plan(LAYER, ids_TK)
    with pytest.raises(ValueError, match="counts rows with a plan's first dispatch"):
        _ = plan.counts
    with pytest.raises(ValueError, match=r"tokens are of torch.float32: DeepEP moves BF16 and FP8"):
        dispatcher.start_dispatch(x_TD.float(), None, plan)
    rows_AD, nothing = dispatcher.start_dispatch(x_TD, None, plan).wait()
    assert nothing is None and len(rows_AD) == sum(plan.counts)
    with pytest.raises(ValueError, match="weights travel with a plan's first dispatch"):
        dispatcher.start_dispatch(x_TD, torch.ones(2, 2), plan)
    with pytest.raises(ValueError, match=r"rows are of torch.float32: DeepEP adds BF16"):
        dispatcher.start_combine(rows_AD.float(), None, plan)
    more = dispatcher.plan(LAYER, ids_TK.repeat(2, 1))
    with pytest.raises(
        CommunicationError, match=r"dispatch of layer 3: 4 tokens: DeepEP's buffer was opened for 2 a rank"
    ):
        dispatcher.start_dispatch(x_TD.repeat(2, 1), None, more).wait()
    dispatcher.close()
    with pytest.raises(ValueError, match=r"dispatch is 'deepep' and tensors are on cpu: DeepEP needs NVIDIA GPUs"):
        open_dispatcher("deepep", {LAYER: placement(2)}, mesh)
    mesh.close()


def test_what_it_cannot_do_is_refused(workers) -> None:
    workers(2)(check_refusals)


def test_a_machine_without_the_library_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(
        ValueError, match=re.escape("build it from https://github.com/deepseek-ai/DeepEP, or give alltoall")
    ):
        load_deep_ep(torch.device("cuda"))
