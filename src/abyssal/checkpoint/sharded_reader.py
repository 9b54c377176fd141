"""Any rectangle of any tensor of a saved folder, of which only the bytes that it needs are read.

The table says which rectangle of which tensor lies where; what a wanted rectangle and a saved one have in common is
read in runs of bytes that lie together, straight into the wanted tensor's memory where that is possible.  So a mesh
may load what another has saved, and an export needs the memory of a few rows.

A saved rectangle is an archive of ``torch.save``.  Its description is read by PyTorch's restricted unpickler, which
tells where in the archive the values begin; nothing else of it is looked at.  One that was saved with another order of
its axes in memory (the transpose of a parameter) is loaded whole.
"""

from __future__ import annotations

import math
import os
import zlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from abyssal.checkpoint.folder import listed
from abyssal.checkpoint.ranks import Ranks
from abyssal.checkpoint.rectangles import Rectangle, first_fault, overlap
from abyssal.checkpoint.safe_metadata import read_metadata
from abyssal.checkpoint.safetensors_file import memory_of
from abyssal.checkpoint.sidecar import FileRecord, TensorRecord, read_sidecar

_METADATA_NAME = ".metadata"
_READ_BYTES = 2 << 20  # what a cache holds, so that summing it up costs no second trip to memory
_LONGEST_CALL = 1 << 30  # Linux transfers at most 2 GiB - 4 KiB a call
_OPEN_FILES = 64
_KNOWN_TENSORS = 16


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A saved rectangle."""

    rectangle: Rectangle
    file: str
    offset: int
    length: int


class _Chunks:
    """The saved rectangles of one tensor, by where they begin on the first axis: of thousands, few are asked for."""

    def __init__(self, chunks: list[_Chunk]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: chunk.rectangle.offsets)
        self._begins = [chunk.rectangle.offsets[:1] for chunk in self._chunks]
        self._longest = max((chunk.rectangle.sizes[:1] for chunk in self._chunks), default=())

    def near(self, wanted: Rectangle) -> list[_Chunk]:
        """All that may overlap with ``wanted``."""
        if not wanted.sizes:
            return self._chunks
        first = bisect_right(self._begins, (wanted.offsets[0] - self._longest[0],)) if self._longest else 0
        return self._chunks[first : bisect_left(self._begins, (wanted.ends[0],))]


class ShardedReader:
    """A saved folder, open for reading.  A context manager.

    Args:
        folder: with its ``state.json``.

    Attributes:
        fields: what was saved beside the tensors.
        tensors: their dtypes and shapes.

    Raises:
        ValueError: ``folder`` holds no complete checkpoint, or one whose table is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sidecar = read_sidecar(folder)
        self.fields, self.tensors, self._files = sidecar.fields, sidecar.tensors, sidecar.files
        self._table: Metadata | None = None
        self._open: OrderedDict[str, int] = OrderedDict()
        self._chunks = lru_cache(_KNOWN_TENSORS)(self._find_chunks)
        self._place = os.open(folder, os.O_RDONLY)  # this folder and none that takes its name meanwhile

    def check_files(self, ranks: Ranks | None = None) -> None:
        """Check that every file is as it was written, each on one of ``ranks``, and open the table.

        One more pass over the files, at some GB/s where they are in memory and at the speed of the disk where not.

        Raises:
            ValueError: naming the file that is missing, truncated or altered, on all ranks.
        """
        ranks = ranks or Ranks()
        ranks.together(lambda: self._check_share(ranks))

    def _check_share(self, ranks: Ranks) -> None:
        if _METADATA_NAME not in self._files or any("/" in name for name in self._files):
            names = listed(list(self._files))
            raise ValueError(f"{self.folder}: is damaged: its files are {names}; use another checkpoint")
        contents = b""
        for number, (name, expected) in enumerate(self._files.items()):
            if name == _METADATA_NAME:
                contents = b"".join(self._checked(name, expected))
            elif number % ranks.size == ranks.rank:
                for _ in self._checked(name, expected):
                    pass
        lengths = {name: record.num_bytes for name, record in self._files.items()}
        self._table = read_metadata(contents, self.folder / _METADATA_NAME, lengths)
        self._compare(self._table)

    def _checked(self, name: str, expected: FileRecord) -> Iterator[bytes]:
        """The contents of a file, block by block, found at the end to be what was written."""
        path, crc32 = self.folder / name, 0
        with open(self._opened(name), "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            while num_bytes == expected.num_bytes and (block := file.read(_READ_BYTES)):
                crc32 = zlib.crc32(block, crc32)
                yield block
        if num_bytes != expected.num_bytes:
            raise ValueError(
                f"{path}: has {num_bytes:,} bytes and {expected.num_bytes:,} were written; use another checkpoint"
            )
        if crc32 != expected.crc32:
            raise ValueError(f"{path}: was altered after it was written (its checksum differs); use another checkpoint")

    def _opened(self, name: str) -> int:
        try:
            return os.open(name, os.O_RDONLY, dir_fd=self._place)
        except FileNotFoundError:
            raise ValueError(f"{self.folder / name}: is missing; use another checkpoint") from None

    def _compare(self, table: Metadata) -> None:
        found = {
            name: TensorRecord(str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
            for name, entry in table.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if found != self.tensors:
            name = next(name for name in (*found, *self.tensors) if found.get(name) != self.tensors.get(name))
            raise ValueError(
                f"{self.folder}: is damaged: {name} is {found.get(name)} in {_METADATA_NAME} and "
                f"{self.tensors.get(name)} in state.json; use another checkpoint"
            )

    def read(self, name: str, wanted: Rectangle) -> Tensor:
        """A rectangle of tensor ``name``, in host memory."""
        values = torch.empty(wanted.sizes, dtype=getattr(torch, self.tensors[name].dtype))
        self.read_into(name, wanted, values)
        return values

    def read_into(self, name: str, wanted: Rectangle, target: Tensor) -> None:
        """Fill ``target``, anywhere and of any strides, with a rectangle of tensor ``name``.

        Raises:
            ValueError: the saved rectangles do not hold it, or the files hold something else than the table says.
        """
        near = self._chunks(name).near(wanted)
        parts = [(chunk, part) for chunk in near if (part := overlap(chunk.rectangle, wanted))]
        fault = first_fault(wanted, [part for _, part in parts])
        if fault is not None:
            times = f"is there {len(fault.owners)} times" if fault.owners else "is not there"
            raise ValueError(f"{self.folder}: {name}{fault.part} {times}; use another checkpoint")
        for chunk, part in parts:
            self._read_part(name, chunk, part, target.detach()[part.within(wanted)])

    def _find_chunks(self, name: str) -> _Chunks:
        assert self._table is not None, "check_files comes first"
        entry = self._table.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        chunks = []
        for chunk in entry.chunks:
            place = self._table.storage_data.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                raise ValueError(
                    f"{self.folder}: is damaged: {name} at {list(chunk.offsets)} lies nowhere; use another checkpoint"
                )
            rectangle = Rectangle(tuple(chunk.offsets), tuple(chunk.sizes))
            chunks.append(_Chunk(rectangle, place.relative_path, place.offset, place.length))
        return _Chunks(chunks)

    # ---- bytes ----

    def _read_part(self, name: str, chunk: _Chunk, part: Rectangle, target: Tensor) -> None:
        descriptor = self._descriptor(chunk.file)
        try:
            begin = self._values_begin(chunk, target.dtype)
            if begin is None:
                target.copy_(self._load(chunk, "cpu")[part.within(chunk.rectangle)])
                return
        except OSError:
            raise
        except Exception as error:  # made to agree with its checksums; what torch.load says of it is bad advice
            raise ValueError(
                f"{self.folder}: its files hold something else than the tensors that {_METADATA_NAME} describes "
                f"({type(error).__name__}); refused, and nothing was run: do not use this folder"
            ) from error
        starts = [one.start for one in part.within(chunk.rectangle)]
        file = _Values(descriptor, self.folder / chunk.file, target.dtype.itemsize)
        if not part.sizes:
            file.fill(begin, (1,), (0,), target.unsqueeze(0))
        else:
            file.fill(begin, chunk.rectangle.sizes, tuple(starts), target)

    def _values_begin(self, chunk: _Chunk, dtype: torch.dtype) -> int | None:
        """The byte of the file at which a chunk's values begin; None if they lie there in another order."""
        described = self._load(chunk, "meta")
        if described.dtype != dtype or tuple(described.shape) != chunk.rectangle.sizes:
            raise TypeError(f"{described.dtype} {list(described.shape)}")
        begin = getattr(described.untyped_storage(), "_checkpoint_offset", None)
        if begin is None or not described.is_contiguous() or described.storage_offset():
            return None
        if begin + described.nbytes > chunk.length:
            raise EOFError
        return chunk.offset + begin

    def _load(self, chunk: _Chunk, device: str) -> Tensor:
        with open(self._descriptor(chunk.file), "rb", closefd=False) as file:
            archive = _create_file_view(file, chunk.offset, chunk.length)
            return torch.load(archive, map_location=device, weights_only=True)  # pyright: ignore[reportArgumentType]

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = self._opened(name)
        self._open.move_to_end(name)
        return self._open[name]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        if self._place >= 0:
            os.close(self._place)
            self._place = -1

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Values:
    """Values in a file, the last axis fastest."""

    descriptor: int
    path: Path
    itemsize: int

    def fill(self, begin: int, sizes: tuple[int, ...], starts: tuple[int, ...], target: Tensor) -> None:
        """Fill ``target`` with the rectangle from ``starts`` on of the tensor of ``sizes`` whose values start at byte
        ``begin``.  What is cut within rows shorter than some MiB is read with these rows."""
        row_bytes = math.prod(sizes[1:]) * self.itemsize
        begin += starts[0] * row_bytes
        num_rows = target.shape[0]
        whole_rows = tuple(target.shape[1:]) == sizes[1:]
        if whole_rows and target.is_contiguous() and target.device.type == "cpu":
            self._read(begin, memory_of(target))
        elif row_bytes > _READ_BYTES and len(sizes) > 1:
            for row in range(num_rows):
                self.fill(begin + row * row_bytes, sizes[1:], starts[1:], target[row])
        else:
            step = max(1, _READ_BYTES // max(1, row_bytes))
            kept = tuple(slice(one, one + size) for one, size in zip(starts[1:], target.shape[1:], strict=True))
            for row in range(0, num_rows, step):
                rows = torch.empty(min(step, num_rows - row), *sizes[1:], dtype=target.dtype)
                self._read(begin + row * row_bytes, memory_of(rows))
                target[row : row + step].copy_(rows[(slice(None), *kept)])

    def _read(self, offset: int, memory: memoryview) -> None:
        position = 0
        while position < len(memory):
            window = memory[position : position + _LONGEST_CALL]
            count = os.preadv(self.descriptor, [window], offset + position)
            if count == 0:
                raise ValueError(f"{self.path}: ended while it was read; use another checkpoint")
            position += count
