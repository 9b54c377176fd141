"""What is saved is the state at the call; the newest few stay; no crash and no full disk costs the last good one."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.train import checkpoints as module
from abyssal.train.checkpoints import Checkpoints, SavedCheckpoint, Staging, saved_checkpoints
from tests.support.forked import exit_status, fork
from tests.support.small_disk import mounted_disk


def _state(step: int) -> dict[str, Tensor]:
    return {
        "model/w": torch.full((40, 50), float(step)),
        "model/bias": torch.full((7,), step, dtype=torch.bfloat16),
        "rng/torch": torch.full((11,), step % 256, dtype=torch.uint8),
    }


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def _assert_holds(checkpoint: SavedCheckpoint | None, step: int) -> None:
    assert checkpoint is not None and checkpoint.step == step
    loaded = {name: torch.zeros_like(tensor) for name, tensor in _state(0).items()}
    assert checkpoint.load(loaded) == {"step": step} == checkpoint.fields()
    for name, tensor in _state(step).items():
        assert torch.equal(loaded[name], tensor), name


def _save(folder: Path, *steps: int, keep: int = 2, asynchronous: bool = False) -> None:
    with Checkpoints(folder, keep, asynchronous) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step), {"step": step})


class _Gate:
    """Holds every write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        write = module.save_sharded

        def held(*arguments: Any) -> None:
            self.begun.set()
            assert self.open.wait(10)
            write(*arguments)

        monkeypatch.setattr(module, "save_sharded", held)


# ---- saving ----


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept(asynchronous: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    _save(folder, 5, 10, 15, 100_000_000, asynchronous=asynchronous)
    assert _names(folder) == ["step-00000015", "step-100000000"]
    _assert_holds(saved_checkpoints(folder)[0], 15)
    _save(folder, 100_000_001, keep=1)
    assert _names(folder) == ["step-100000001"]


def test_fewer_than_are_kept_all_stay(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, keep=5)
    _save(tmp_path, 4, 5, keep=5)
    assert [checkpoint.step for checkpoint in saved_checkpoints(tmp_path)] == [1, 2, 3, 4, 5]


def test_the_state_at_the_call_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _Gate(monkeypatch)
    state, fields = _state(1), {"step": 1, "counters": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, fields)
        assert gate.begun.wait(10) and checkpoints.latest() is None
        for tensor in state.values():
            tensor.fill_(99)
        fields["counters"].append(2)  # pyright: ignore[reportAttributeAccessIssue]
        gate.open.set()
        checkpoints.wait()
        latest = checkpoints.latest()
        assert latest is not None
        loaded = _state(0)
        assert latest.load(loaded) == {"step": 1, "counters": [1]}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in _state(1).items())


def test_one_write_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _Gate(monkeypatch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), {"step": 1})
        second = threading.Thread(target=checkpoints.save, args=(2, _state(2), {"step": 2}))
        second.start()
        second.join(0.05)
        assert second.is_alive(), "it would have copied over what is being written"
        gate.open.set()
        second.join(10)
    assert [checkpoint.step for checkpoint in saved_checkpoints(tmp_path)] == [1, 2]
    _assert_holds(saved_checkpoints(tmp_path)[0], 1)


def _copied(staging: Staging, tensors: Mapping[str, Tensor | Sharded]) -> dict[str, Tensor]:
    """All copies, those of shards by name and number."""
    copies: dict[str, Tensor] = {}
    for name, copy in staging.copy(tensors).items():
        shards = copy.shards if isinstance(copy, Sharded) else [Shard((), copy)]
        copies |= {f"{name}/{number}": shard.tensor for number, shard in enumerate(shards)}
    return copies


def test_buffers_are_made_once() -> None:
    staging = Staging()
    places = {name: copy.data_ptr() for name, copy in _copied(staging, _state(1)).items()}
    copies = _copied(staging, _state(2))
    assert {name: copy.data_ptr() for name, copy in copies.items()} == places
    assert all(torch.equal(copies[f"{name}/0"], tensor) for name, tensor in _state(2).items())
    strided = torch.arange(6.0).view(2, 3).t().requires_grad_()
    other = _copied(staging, {"model/w": strided})
    assert list(other) == ["model/w/0"] and torch.equal(other["model/w/0"], strided.detach())
    assert not other["model/w/0"].requires_grad and other["model/w/0"].is_contiguous()


def test_shards_are_copied_too() -> None:
    staging, live = Staging(), torch.arange(12.0).view(4, 3)
    state = {"w": Sharded((9, 3), torch.float32, (Shard((2, 0), live[:1]), Shard((5, 0), live[1:])))}
    places = [copy.data_ptr() for copy in _copied(staging, state).values()]
    live.add_(1)
    copied = staging.copy(state)["w"]
    live.fill_(-1)
    assert isinstance(copied, Sharded) and (copied.shape, copied.dtype) == ((9, 3), torch.float32)
    assert [shard.offsets for shard in copied.shards] == [(2, 0), (5, 0)]
    assert [shard.tensor.data_ptr() for shard in copied.shards] == places
    assert torch.equal(torch.cat([shard.tensor for shard in copied.shards]), torch.arange(1.0, 13.0).view(4, 3))


# ---- what is there ----


def test_what_is_not_whole_is_not_the_latest(tmp_path: Path) -> None:
    assert saved_checkpoints(tmp_path / "nothing") == []
    _save(tmp_path, 3, 4)
    whole = tmp_path / "step-00000004"
    shutil.copytree(whole, tmp_path / ".step-00000009.partial")
    shutil.copytree(whole, tmp_path / "step-00000010", ignore=shutil.ignore_patterns("state.json"))
    shutil.copytree(whole, tmp_path / "step-00000011")
    (tmp_path / "step-00000011" / "state.json").write_text("{")
    shutil.copytree(whole, tmp_path / "step-12")
    (tmp_path / "step-00000013").touch()
    assert [checkpoint.step for checkpoint in saved_checkpoints(tmp_path)] == [3, 4]
    with Checkpoints(tmp_path) as checkpoints:
        _assert_holds(checkpoints.latest(), 4)
        checkpoints.save(9, _state(9), {"step": 9})
        checkpoints.wait()
        _assert_holds(checkpoints.latest(), 9)


def test_what_others_left_there_stays(tmp_path: Path) -> None:
    for name in (".notes.partial", ".step-1.partial", "mine", ".step-00000001.other"):
        (tmp_path / name).mkdir()
    _save(tmp_path, 1)
    assert _names(tmp_path) == [".notes.partial", ".step-00000001.other", ".step-1.partial", "mine", "step-00000001"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with Checkpoints(tmp_path), pytest.raises(ValueError, match="another process is training there"):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


def test_odd_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path / "a", keep=0)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="field 'seconds'"):
        checkpoints.save(1, _state(1), {"seconds": float("nan")})
    assert _names(tmp_path) == []


# ---- no room ----


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)

    class Usage:
        free = 1234

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(ValueError) as error:
            checkpoints.save(2, _state(2), {"step": 2})
        _assert_names_all(error.value, tmp_path / "step-00000002", "1,234 free", "step-00000001")
        _assert_holds(checkpoints.latest(), 1)


def _assert_names_all(error: BaseException, *parts: object) -> None:
    for part in (*parts, "needs", "bytes", "--resume"):
        assert str(part) in str(error), str(error)


CALLS: list[Callable[[Checkpoints], object]] = [
    lambda checkpoints: checkpoints.save(3, _state(3), {"step": 3}),
    lambda checkpoints: checkpoints.wait(),
    lambda checkpoints: checkpoints.close(),
]


@pytest.mark.parametrize("call", CALLS, ids=["save", "wait", "close"])
def test_errors_of_the_background_come_with_the_next_call(
    call: Callable[[Checkpoints], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if os.lseek(descriptor, 0, os.SEEK_CUR) > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        checkpoints.save(2, _state(2), {"step": 2})
        with pytest.raises(ValueError) as error:
            call(checkpoints)
        _assert_names_all(error.value, tmp_path / "step-00000002", "No space left on device", "is step-00000001")
        assert _names(tmp_path) == ["step-00000001"]
    _assert_holds(checkpoints.latest(), 1)
    checkpoints.wait()  # told once
    if call is not CALLS[2]:
        checkpoints.save(4, _state(4), {"step": 4})  # room was made
        checkpoints.close()
        assert _names(tmp_path) == ["step-00000001", "step-00000004"]


def test_the_first_save_that_fails_says_that_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "save_sharded", fail)
    with pytest.raises(ValueError, match=r"Input/output error.*there is no checkpoint before it"):
        _save(tmp_path, 1)


def test_what_ended_the_run_is_not_hidden_by_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "save_sharded", fail)
    with pytest.raises(FloatingPointError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), {"step": 1})
        raise FloatingPointError("step 2: NaN")
    assert any("Input/output error" in note for note in error.value.__notes__)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.mark.parametrize("checked", [True, False], ids=["seen before", "met while writing"])
def test_a_disk_that_is_full(checked: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.randn(50_000), "b": torch.randn(50_000)}
    if not checked:
        monkeypatch.setattr(module, "bytes_needed", lambda tensors: 0)
    with Checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        checkpoints.wait()
        (small_disk / "others").write_bytes(b"x" * 400_000)
        with pytest.raises(ValueError) as error:
            checkpoints.save(2, state, {"step": 2})
            checkpoints.wait()
        _assert_names_all(error.value, "step-00000002: not saved", "last good checkpoint is step-00000001")
        assert checked or "No space left on device" in str(error.value)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        latest = checkpoints.latest()
        assert latest is not None and latest.load(loaded) == {"step": 1}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        (small_disk / "others").unlink()
        checkpoints.save(3, state, {"step": 3})
    assert _names(small_disk) == ["step-00000003"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The system's own error, where no disk can be made."""
    _save(tmp_path, 1)

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(ValueError, match=r"File too large.*is step-00000001"):
            _save(tmp_path, 2, asynchronous=True)

    assert exit_status(fork(write)) == 0
    assert _names(tmp_path) == ["step-00000001"]


# ---- killed ----


def _killed_at(kind: str, moment: int, work: Callable[[], object]) -> bool:
    """Whether ``work`` was killed, with SIGKILL before its ``moment``-th call of ``os.kind``."""

    def count_and_work() -> None:
        calls, call = itertools.count(1), getattr(os, kind)

        def counted(*arguments: Any, **options: Any) -> Any:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(os, kind, counted)
        work()

    status = exit_status(fork(count_and_work))
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(
    ("kind", "stride"), [("write", 5), ("mkdir", 1), ("fsync", 1), ("rename", 1), ("unlink", 1), ("rmdir", 1)]
)
def test_a_kill_at_any_moment_leaves_whole_checkpoints(
    kind: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves with one kept, and the second once more: written, named, the older one removed, one replaced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and a kill loses nothing that was written
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        _save(folder, 1)
        work = functools.partial(_save, folder, 2, 3, 3, keep=1, asynchronous=True)
        if not _killed_at(kind, 1 + kills * stride, work):
            break
        kills += 1
        Checkpoints(folder).close()
        whole = saved_checkpoints(folder)
        assert whole and _names(folder) == [checkpoint.path.name for checkpoint in whole]
        for checkpoint in whole:
            _assert_holds(checkpoint, checkpoint.step)
    assert kills >= 3
    assert _names(folder) == ["step-00000003"]
