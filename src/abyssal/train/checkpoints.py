"""Checkpoints of a run: copied aside in a moment, written while training goes on, the newest few kept.

    RUN/checkpoints/step-00001000/      one folder a checkpoint (:mod:`abyssal.checkpoint.sharded`)
    RUN/checkpoints/.lock               held by the process that trains

``save`` copies the tensors into buffers in host memory and returns, so that the steps that follow change nothing of
what is written.  The buffers are kept from save to save: the price is one more copy of the state in host memory, and
the gain that a save costs a copy and no page faults.  One write is in flight at most; the next save waits for it.  An
error of the background is raised by the next call, never lost.

Of a run on many ranks each rank copies and writes what it holds, into one folder on the file system that they share;
the lock, the clean-up and the removal of old checkpoints are the first rank's.  All ranks save at the same step, and
what fails on one is raised on all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed

from abyssal.checkpoint.ranks import Ranks
from abyssal.checkpoint.sharded import bytes_needed, load_sharded, read_fields, save_sharded
from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.checkpoint.sidecar import json_copy
from abyssal.checkpoint.whole_folder import clean_up, remove

LONGEST_WRITE = timedelta(hours=2)
"""That the rank which is done first waits for the others.  One that has died is noticed at once, as its connections
close; what this is for is a rank that hangs where nobody watches."""

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, order=True)
class SavedCheckpoint:
    """A checkpoint that is there whole."""

    step: int
    path: Path

    def fields(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        return read_fields(self.path)

    def load(
        self, tensors: Mapping[str, Tensor | Sharded], part: str = "", group: distributed.ProcessGroup | None = None
    ) -> dict[str, Any]:
        """Fill ``tensors`` in place and return the fields; as :func:`~abyssal.checkpoint.sharded.load_sharded`."""
        return load_sharded(self.path, tensors, part, group)


def saved_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """The whole checkpoints in ``folder``, oldest first; none where there is no such folder.

    Folders whose ``state.json`` cannot be read are passed over.
    """
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    saved = [SavedCheckpoint(int(match[1]), path) for match, path in found if match is not None]
    return sorted(checkpoint for checkpoint in saved if _is_whole(checkpoint))


def newest_checkpoint(folder: Path, group: distributed.ProcessGroup | None = None) -> SavedCheckpoint | None:
    """The newest whole checkpoint in ``folder``; the same one on all ranks of ``group``."""
    return Ranks(group).first(lambda: max(saved_checkpoints(folder), default=None))


class Checkpoints:
    """The checkpoints of a run that is being trained by this process, or by the ranks of ``group`` together.

    A context manager: leaving it waits for the last write.

    Args:
        folder: where they lie; made if absent.
        keep: the newest so many are kept.
        asynchronous: write in the background; False writes before ``save`` returns, without a copy.
        group: all ranks, which open and close this together.  What they say to each other while they write goes through
            a group of its own, so that training may use this one meanwhile.

    Raises:
        ValueError: ``keep`` below 1, or another process is training in ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        asynchronous: bool = True,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must stay; give 1 or more")
        self.folder = folder
        self._keep = keep
        self._staging = Staging() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._lock: int | None = None
        Ranks(group).first(self._take_folder)
        self._group = None if group is None else _like(group)
        self._ranks = Ranks(self._group)

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        clean_up(self.folder, _NAME)

    def save(self, step: int, tensors: Mapping[str, Tensor | Sharded], fields: dict[str, Any]) -> None:
        """Save the state at ``step``.  The tensors and fields may change as soon as this returns.

        Args:
            step: steps done; a checkpoint of the same step is replaced.
            tensors: by name, on any device; what this rank holds of them.
            fields: JSON values.

        Raises:
            ValueError: a field that JSON cannot keep, too little room on the disk, or what went wrong with the save
                before this one.  The message names the last good checkpoint.
        """
        self.wait()
        target = self.folder / f"step-{step:08d}"
        fields = self._ranks.together(lambda: json_copy(fields))
        needed = self._check_room(target, tensors)
        if self._staging is None:
            self._write(target, tensors, fields, needed)
        else:
            self._writing = self._thread.submit(self._write, target, self._staging.copy(tensors), fields, needed)

    def _check_room(self, target: Path, tensors: Mapping[str, Tensor | Sharded]) -> int:
        """Bytes that all ranks together need, which the disk has."""
        by_rank = self._ranks.gather(lambda: bytes_needed(tensors))

        def checked() -> int:
            needed, free = sum(by_rank), shutil.disk_usage(self.folder).free
            if free < needed:
                raise ValueError(self._message(target, "not saved", needed, free))
            return needed

        return self._ranks.first(checked)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            ValueError: what went wrong with the last save.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and let another process train in this folder.

        Raises:
            ValueError: what went wrong with the last save.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:
                distributed.destroy_process_group(self._group)
                self._group = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def latest(self) -> SavedCheckpoint | None:
        """The newest whole checkpoint on disk."""
        return max(saved_checkpoints(self.folder), default=None)

    def _write(
        self, target: Path, tensors: Mapping[str, Tensor | Sharded], fields: dict[str, Any], needed: int
    ) -> None:
        try:
            save_sharded(target, tensors, fields, self._group)
            self._ranks.first(lambda: self._remove_older(target))
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            reason = f"not saved ({error.strerror or error})"
            raise ValueError(self._message(target, reason, needed, free)) from error

    def _remove_older(self, target: Path) -> None:
        older = [checkpoint.path for checkpoint in saved_checkpoints(self.folder) if checkpoint.path != target]
        for path in older[: max(0, len(older) + 1 - self._keep)]:
            remove(path)

    def _message(self, target: Path, reason: str, needed: int, free: int) -> str:
        latest = self.latest()
        last = (
            "there is no checkpoint before it; put that right and start again"
            if latest is None
            else f"the last good checkpoint is {latest.path.name}; put that right, then go on from it with --resume"
        )
        return f"{target}: {reason}: a checkpoint needs {needed:,} bytes and the disk has {free:,} free; {last}"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except ValueError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the run comes first


class Staging:
    """Copies of tensors in host memory, in buffers that are allocated once."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor | Sharded]) -> dict[str, Tensor | Sharded]:
        """Copies of ``tensors``, done when this returns; they hold until the next call."""
        live = {(name, offsets): tensor for name, one in tensors.items() for offsets, tensor in _parts(one)}
        self._buffers = {place: self._buffer(place, tensor) for place, tensor in live.items()}
        for place, tensor in live.items():
            self._buffers[place].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in live.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._like(name, tensor) for name, tensor in tensors.items()}

    def _buffer(self, place: tuple[str, tuple[int, ...]], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _like(self, name: str, tensor: Tensor | Sharded) -> Tensor | Sharded:
        if not isinstance(tensor, Sharded):
            return self._buffers[name, ()]
        shards = tuple(Shard(shard.offsets, self._buffers[name, shard.offsets]) for shard in tensor.shards)
        return replace(tensor, shards=shards)


def _parts(tensor: Tensor | Sharded) -> list[tuple[tuple[int, ...], Tensor]]:
    """What there is to be copied, each with what tells it from the others of its name."""
    return [(shard.offsets, shard.tensor) for shard in tensor.shards] if isinstance(tensor, Sharded) else [((), tensor)]


def _like(group: distributed.ProcessGroup) -> distributed.ProcessGroup:
    """Another group of the same ranks, over gloo."""
    made = distributed.new_group(distributed.get_process_group_ranks(group), timeout=LONGEST_WRITE, backend="gloo")
    assert isinstance(made, distributed.ProcessGroup)
    return made


def _is_whole(checkpoint: SavedCheckpoint) -> bool:
    try:
        checkpoint.fields()
    except (ValueError, OSError):
        return False
    return True


def _lock(folder: Path) -> int | None:
    """An open file that keeps other processes out; the system lets go of it when this one ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(f"{folder}: another process is training there; wait for it, or end it first") from None
        return None  # a file system without locks
    return descriptor
