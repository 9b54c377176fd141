"""A state that is cut one way and saved comes back bit for bit cut any other way; what is not whole is not saved."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from abyssal.checkpoint import sharded_reader
from abyssal.checkpoint.rectangles import Rectangle
from abyssal.checkpoint.sharded import load_sharded, save_sharded
from abyssal.checkpoint.sharded_plan import check_plans, plan_of
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.checkpoint.shards import Shard, Sharded
from tests.support.sharded_parts import save_parts
from tests.support.tilings import rectangles, shapes, tilings

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn]
WEIGHT, STACK = "model/layers.0.attention.q.weight", "optimizer/layers.1.ffn.experts.w_down_EDF/mean"

Parts = list[dict[str, Tensor | Sharded]]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def cut(tensor: Tensor, tiles: list[Rectangle]) -> tuple[Shard, ...]:
    """Views of a tensor."""
    whole = Rectangle.whole(tensor.shape)
    return tuple(Shard(tile.offsets, tensor[tile.within(whole)]) for tile in tiles)


@st.composite
def meshes(draw: st.DrawFn, tensors: dict[str, Tensor]) -> Parts:
    """What each of one to four ranks holds of ``tensors``: any rectangles, on any rank."""
    parts: Parts = [{} for _ in range(draw(st.integers(1, 4)))]
    for name, tensor in tensors.items():
        shards: list[list[Shard]] = [[] for _ in parts]
        for shard in cut(tensor, draw(tilings(tuple(tensor.shape)))):
            shards[draw(st.integers(0, len(parts) - 1))].append(shard)
        for part, own in zip(parts, shards, strict=True):
            part[name] = Sharded(tuple(tensor.shape), tensor.dtype, tuple(own))
    return parts


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(st.data())
def test_any_mesh_loads_what_any_other_saved(data: st.DataObject) -> None:
    names = [WEIGHT, STACK, "generator/torch"]
    drawn = {name: (data.draw(shapes), data.draw(st.sampled_from(DTYPES))) for name in names}
    state = {name: random_bits(*one, seed) for seed, (name, one) in enumerate(drawn.items())}
    empty = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as path:
        save_parts(Path(path, "a"), data.draw(meshes(state)))
        for part in data.draw(meshes(empty)):
            load_sharded(Path(path, "a"), part)
    for name, tensor in state.items():
        assert bits(empty[name]) == bits(tensor), name


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([1, 16, 1 << 20]))
def test_rectangles_are_read_alone(data: st.DataObject, read_bytes: int) -> None:
    shape = data.draw(shapes)
    tensor, wanted = random_bits(shape, torch.float32), data.draw(rectangles(shape))
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_reader, "_READ_BYTES", read_bytes)
        save_parts(Path(path, "a"), [{"w": Sharded(shape, tensor.dtype, cut(tensor, data.draw(tilings(shape))))}])
        with ShardedReader(Path(path, "a")) as reader:
            reader.check_files()
            found = reader.read("w", wanted)
    assert found.shape == wanted.sizes
    assert bits(found) == bits(tensor[wanted.within(Rectangle.whole(shape))])


def test_only_the_bytes_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, 1000)
    save_parts(
        tmp_path / "a", [{"w": Sharded((1000, 1000), torch.float32, cut(tensor, [Rectangle.whole((1000, 1000))]))}]
    )
    read: list[int] = []
    preadv = sharded_reader.os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    with ShardedReader(tmp_path / "a") as reader:
        reader.check_files()
        monkeypatch.setattr(sharded_reader.os, "preadv", counted)
        rows = reader.read("w", Rectangle((400, 0), (3, 1000)))
    assert torch.equal(rows, tensor[400:403]) and read == [3 * 1000 * 4]


def test_a_transpose_is_read_whole_and_cut(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    save_sharded(tmp_path / "a", {"w": tensor}, {})
    rows = torch.zeros(2, 3)
    load_sharded(tmp_path / "a", {"w": Sharded((4, 3), torch.float32, (Shard((1, 0), rows),))})
    assert torch.equal(rows, tensor[1:3])


# ---- PyTorch ----


def test_pytorch_reads_what_ranks_wrote(tmp_path: Path) -> None:
    state = {WEIGHT: torch.randn(7, 5), STACK: torch.randn(4, 3, 2)}
    tiles = {WEIGHT: [Rectangle((0, 0), (3, 5)), Rectangle((3, 0), (4, 5))]}
    tiles[STACK] = [Rectangle((expert, 0, 0), (1, 3, 2)) for expert in range(4)]
    parts: Parts = [
        {name: Sharded(tuple(one.shape), one.dtype, cut(one, tiles[name][rank::2])) for name, one in state.items()}
        for rank in range(2)
    ]
    save_parts(tmp_path / "a", parts)
    loaded: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.load(loaded, checkpoint_id=tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_one_process_writes_what_pytorchs_own_planner_makes_of_it(tmp_path: Path) -> None:
    state = {
        "w": torch.randn(3, 4),
        "strided": torch.randn(4, 3).t(),
        "part": torch.randn(9)[2:5],
        "n": torch.tensor(3),
    }
    save_sharded(tmp_path / "ours", state, {})
    writer, planner = FileSystemWriter(tmp_path / "theirs"), DefaultSavePlanner()
    planner.set_up_planner(state, None, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, table = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.storage_meta = sharded_meta  # pyright: ignore[reportAttributeAccessIssue]
    writer.finish(table, [writer.write_data(plan, planner).wait()])
    for name in ("__0_0.distcp", ".metadata"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def sharded_meta() -> Any:
    return dcp.metadata.StorageMeta()


# ---- what is not whole ----


def _stack(*experts: int, rows: tuple[int, int] = (0, 6)) -> Sharded:
    size = rows[1] - rows[0]
    shards = [Shard((expert, rows[0], 0), torch.ones(1, size, 3)) for expert in experts]
    return Sharded((8, 6, 3), torch.float32, tuple(shards))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([_stack(0, 1, 2, 3), _stack(4, 6, 7)], f"no rank holds expert 5 of {STACK};"),
        ([_stack(0, 1, 2), _stack(6, 7)], f"no rank holds experts 3 to 5 of {STACK};"),
        ([_stack(*range(5)), _stack(*range(4, 8))], f"expert 4 of {STACK} comes from ranks 0, 1;"),
        ([_stack(*range(8)), _stack(2), _stack(2)], f"expert 2 of {STACK} comes from ranks 0, 1, 2;"),
        (
            [_stack(*range(8), rows=(0, 3)), _stack(*range(8), rows=(4, 6))],
            rf"no rank holds expert 0 of {STACK} \(\[0:1, 3:4, 0:3\]\)",
        ),
        ([_stack(), _stack()], f"no rank holds experts 0 to 7 of {STACK};"),
        ([_stack(*range(8)), torch.ones(8, 6, 3)], f"expert 0 of {STACK} comes from ranks 0, 1;"),
        ([_stack(*range(8)), torch.ones(8, 6, 4)], r"is float32 \[8, 6, 4\] on rank 1 and otherwise on a rank before"),
        ([_stack(*range(8)), Sharded((8, 6, 3), torch.bfloat16)], r"is bfloat16 \[8, 6, 3\] on rank 1"),
    ],
)
def test_what_the_ranks_do_not_hold_once_is_named(parts: list[Tensor | Sharded], problem: str) -> None:
    plans = [plan_of({STACK: part}) for part in parts]
    with pytest.raises(ValueError, match=rf"do not hold every tensor whole and once: .*{problem}"):
        check_plans(plans)


def test_rows_of_a_plain_matrix_are_named() -> None:
    part = Sharded((10, 2), torch.float32, (Shard((0, 0), torch.ones(4, 2)), Shard((7, 0), torch.ones(3, 2))))
    with pytest.raises(ValueError, match=rf"no rank holds {WEIGHT}\[4:7, 0:2\];"):
        check_plans([plan_of({WEIGHT: part})])
    with pytest.raises(ValueError, match=f"{WEIGHT} comes from ranks 0, 2;"):
        check_plans([plan_of(one) for one in ({WEIGHT: torch.ones(3)}, {}, {WEIGHT: torch.ones(3)})])
    with pytest.raises(ValueError, match="empty comes from ranks 0, 1;"):
        check_plans([plan_of({"empty": torch.ones(0, 3)})] * 2)


@pytest.mark.parametrize(
    "shard",
    [
        Shard((8, 0), torch.ones(3, 2)),
        Shard((0,), torch.ones(3)),
        Shard((0, 0), torch.ones(3, 2, 1)),
        Shard((-1, 0), torch.ones(3, 2)),
        Shard((0, 0), torch.ones(3, 2, dtype=torch.bfloat16)),
    ],
)
def test_a_shard_that_does_not_fit_its_tensor(shard: Shard, tmp_path: Path) -> None:
    odd = {WEIGHT: Sharded((10, 2), torch.float32, (shard,))}
    with pytest.raises(ValueError, match=rf"{WEIGHT}: the shard at \["):
        save_sharded(tmp_path / "a", odd, {})
    assert not list(tmp_path.iterdir())
    save_sharded(tmp_path / "a", {WEIGHT: torch.ones(10, 2)}, {})
    with pytest.raises(ValueError, match=rf"{WEIGHT}: the shard at \["):
        load_sharded(tmp_path / "a", odd)


def test_a_hole_in_the_table_is_found_by_those_who_need_it(tmp_path: Path) -> None:
    """Files that agree with their checksums and hold too little: not what a disk does, but nothing may be guessed."""
    tensor = torch.arange(20.0).view(10, 2)
    tiles = [Rectangle((0, 0), (4, 2)), Rectangle((4, 0), (6, 2))]
    save_parts(tmp_path / "a", [{WEIGHT: Sharded((10, 2), torch.float32, cut(tensor, tiles))}])
    with ShardedReader(tmp_path / "a") as reader:
        reader.check_files()
        assert reader._table is not None
        entry: Any = reader._table.state_dict_metadata[WEIGHT]
        del entry.chunks[0]
        assert torch.equal(reader.read(WEIGHT, Rectangle((5, 0), (2, 2))), tensor[5:7])
        with pytest.raises(ValueError, match=rf"{WEIGHT}\[2:4, 0:2\] is not there; use another checkpoint"):
            reader.read(WEIGHT, Rectangle((2, 0), (4, 2)))
        entry.chunks *= 2
        reader._chunks.cache_clear()
        with pytest.raises(ValueError, match=rf"{WEIGHT}\[5:7, 0:2\] is there 2 times"):
            reader.read(WEIGHT, Rectangle((5, 0), (2, 2)))


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    save_sharded(tmp_path / "a", {"w": torch.ones(3)}, {})
    with ShardedReader(tmp_path / "a") as reader:
        reader.check_files()
        shutil.rmtree(tmp_path / "a")
        save_sharded(tmp_path / "a", {"w": torch.zeros(3)}, {})
        with pytest.raises(ValueError, match=r"__0_0\.distcp: is missing; use another checkpoint"):
            reader.read("w", Rectangle((0,), (3,)))
