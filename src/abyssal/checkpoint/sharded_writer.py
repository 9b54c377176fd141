"""Rectangles of tensors into the files of PyTorch's distributed-checkpoint format, and the table of all ranks' files.

Each rank writes its rectangles into a file of its own, as ``torch.save`` writes each, through PyTorch's own storage
writer; the first rank then writes the table from what all have written.  What one process alone writes is, byte for
byte, what PyTorch's planner and writer make of the same tensors.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from abyssal.checkpoint.sharded_plan import shards_of
from abyssal.checkpoint.shards import Sharded
from abyssal.checkpoint.sidecar import FileRecord

_WRITE_BYTES = 2 << 20  # what a cache holds, so that summing it up costs no second trip to memory


@dataclass(frozen=True)
class WrittenFile:
    """What a rank has written."""

    items: list[WriteItem]
    results: list[WriteResult]
    records: dict[str, FileRecord]


def write_file(folder: Path, tensors: Mapping[str, Tensor | Sharded], rank: int = 0) -> WrittenFile:
    """Write this rank's rectangles into its file in ``folder``, in the order of ``tensors``, and sync it.

    Raises:
        OSError: the disk is full or fails.
    """
    items, held = _items(tensors)
    writer = _Writer(folder)
    writer.set_up_storage_writer(is_coordinator=rank == 0)
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{rank}_"))
    try:
        results = writer.write_data(plan, _Holdings(held)).wait()
    except Exception as error:
        raise writer.files.error or error from None  # torch.save hides the error of the file behind one of its own
    return WrittenFile(items, results, writer.files.records)


def write_table(folder: Path, written: Sequence[WrittenFile]) -> dict[str, FileRecord]:
    """Write PyTorch's table of what all ranks have written; all files, the table with them."""
    plans, table = create_default_global_save_plan([SavePlan(one.items) for one in written])
    table = replace(table, planner_data={name: (name,) for name in table.state_dict_metadata})
    indices = {item.index: item.index for plan in plans for item in plan.items}  # now with their place among chunks
    writer = _Writer(folder)
    writer.finish(table, [[replace(one, index=indices[one.index]) for one in file.results] for file in written])
    files: dict[str, FileRecord] = {}
    for one in written:
        files |= one.records
    return files | writer.files.records


def _items(tensors: Mapping[str, Tensor | Sharded]) -> tuple[list[WriteItem], dict[MetadataIndex, Tensor]]:
    """What is to be written, as PyTorch plans it, and the rectangle that each item is."""
    items: list[WriteItem] = []
    held: dict[MetadataIndex, Tensor] = {}
    for name, tensor in tensors.items():
        kind = WriteItemType.SHARD if isinstance(tensor, Sharded) else WriteItemType.TENSOR
        for shard in shards_of(tensor):
            offsets = torch.Size(shard.offsets)
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, shard.tensor.size()),
                TensorProperties.create_from_tensor(shard.tensor),
                torch.Size(tensor.shape),
            )
            items.append(WriteItem(MetadataIndex(name, offsets), kind, tensor_data=data))
            held[items[-1].index] = shard.tensor
    return items, held


class _Holdings(DefaultSavePlanner):
    """Says what tensor an item is."""

    def __init__(self, held: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._held = held

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._held[write_item.index]


class _Writer(FileSystemWriter):
    """PyTorch's writer, noting sizes and checksums as bytes pass, and leaving paths and random ids out of the table."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.files = _Files()
        self.fs = self.files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Files(FileSystem):
    """The file system as the writer sees it.

    Attributes:
        records: each file that was written, by its name.
        error: what the operating system refused while a file was written.
    """

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", "a writer writes"
        file = _CheckedFile(path)
        try:
            with _Stream(file, _WRITE_BYTES) as stream:
                yield stream
        finally:
            self.error = file.error
        self.records[Path(path).name] = FileRecord(file.num_bytes, file.crc32)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Stream(io.BufferedWriter):
    """Gathers the dozens of headers that torch.save writes for each tensor, one call of the system each otherwise."""

    def fileno(self) -> int:
        """Asked for to sync the file, which must have everything by then."""
        self.flush()
        return super().fileno()


class _CheckedFile(io.FileIO):
    """A file that sums up what is appended to it, block by block."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "wb")
        self.num_bytes = 0
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        block = memoryview(data)[:_WRITE_BYTES]
        try:
            written = os.write(self.fileno(), block)
        except OSError as error:
            self.error = error
            raise
        self.crc32 = zlib.crc32(block[:written], self.crc32)
        self.num_bytes += written
        return written
