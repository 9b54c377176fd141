"""Safetensors files in streams: rows straight from disk into a tensor's memory, and from memory into a file.

The `safetensors` library maps a file into memory, so that the resident set grows by the pages read beside the tensor
that they are copied to; a checkpoint that just fits is then killed.  Here a row block is one ``pread`` into its final
place and one ``pwrite`` from it, so a reader needs no memory of its own.  The trade-off not taken is sharing the pages
of a file between processes.

A file is written under a temporary name, header first (its layout follows from names, dtypes and shapes alone), and
gets its own name only when every row is there and on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from abyssal.checkpoint.safetensors_header import TensorEntry, format_header, header_length, parse_header

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

_LONGEST_CALL = 1 << 30  # Linux transfers at most 2 GiB - 4 KiB a call
_SYNC_BYTES = 256 << 20


class SafetensorsReader:
    """An open file.  Its header is checked when it is opened; data is read only when asked for.

    Args:
        path: the file.
        drop_cache: tell the kernel to forget pages once read; for one pass over more data than fits into memory.

    Raises:
        ValueError: the file is truncated, corrupt or not safetensors, naming the file and the tensor.
    """

    def __init__(self, path: Path, drop_cache: bool = False) -> None:
        self.path = path
        self._drop_cache = drop_cache
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(self._descriptor).st_size
            length = header_length(os.pread(self._descriptor, 8, 0), size, str(path))
            self.header = parse_header(os.pread(self._descriptor, length, 8), size, str(path))
        except BaseException:
            self.close()
            raise

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors of the file by name, in the order in which they lie."""
        return self.header.entries

    def read_into(self, name: str, target: Tensor, row: int = 0) -> None:
        """Fill ``target`` with the rows of tensor ``name`` from ``row`` on, without a copy in between.

        ``target`` is contiguous, on the CPU, of the dtype of the file; its shape is that of the rows to read.

        Raises:
            ValueError: the file ended before the rows did (it was cut after it was opened).
        """
        entry = self.entries[name]
        assert target.dtype == TORCH_DTYPES[entry.dtype], f"{name} is {entry.dtype}, the target {target.dtype}"
        memory = memory_of(target)
        begin = row * entry.row_bytes
        assert begin + len(memory) <= entry.num_bytes, f"rows from {row} on, of shape {target.shape}: beyond {entry}"
        offset = self.header.offsets[name] + begin
        position = 0
        while position < len(memory):
            window = memory[position : position + _LONGEST_CALL]
            count = os.preadv(self._descriptor, [window], offset + position)
            if count == 0:
                raise ValueError(
                    f"{self.path}: ended inside tensor {name}; it changed while it was read, fetch it again"
                )
            position += count
        if self._drop_cache:
            _forget_pages(self._descriptor, offset, len(memory))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of tensor ``name`` as a new CPU tensor in the file's dtype."""
        entry = self.entries[name]
        rows = () if not entry.shape else ((entry.shape[0] if stop is None else stop) - start,)
        target = torch.empty((*rows, *entry.shape[1:]), dtype=TORCH_DTYPES[entry.dtype])
        self.read_into(name, target, start)
        return target

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsWriter:
    """A file in the making.  Rows of each tensor are written in order; tensors in any order.

    As a context manager it commits when the block ends well; on an error it removes the temporary file, unless the
    write is ``resumable``.

    Args:
        path: the file's final name.
        entries: every tensor that the file will hold.
        metadata: strings for the header; transformers asks for ``{"format": "pt"}``.
        resumable: keep the temporary file on an error, for a later ``resume``.
        resume: rows of each tensor that an earlier, interrupted writer of the same file had synced; None starts anew.

    Raises:
        ValueError: ``resume`` was given but the temporary file is gone or declares other tensors.
    """

    def __init__(
        self,
        path: Path,
        entries: Iterable[TensorEntry],
        metadata: Mapping[str, str] | None = None,
        resumable: bool = False,
        resume: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.temporary = temporary_name(path)
        first, self.header = format_header(entries, {"format": "pt"} if metadata is None else metadata)
        self._resumable = resumable
        self._rows_written = {name: (resume or {}).get(name, 0) for name in self.header.entries}
        flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if resume is None else 0)
        try:
            self._descriptor = os.open(self.temporary, flags, 0o666)
        except FileNotFoundError:
            raise ValueError(f"{self.temporary}: is gone, so its writing cannot be resumed; start anew") from None
        try:
            self._begin(first, resume is not None)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _begin(self, first: bytes, resume: bool) -> None:
        self._synced = 0
        if resume:
            size = os.fstat(self._descriptor).st_size
            if size != self.header.file_bytes or os.pread(self._descriptor, len(first), 0) != first:
                raise ValueError(f"{self.temporary}: was begun for other tensors; delete it and start anew")
        else:
            _write_all(self._descriptor, memoryview(first), 0)
            os.ftruncate(self._descriptor, self.header.file_bytes)

    def write_rows(self, name: str, rows: Tensor) -> None:
        """Append ``rows`` (CPU, the declared dtype) to tensor ``name``."""
        entry, start = self.header.entries[name], self._rows_written[name]
        count = rows.shape[0] if entry.shape else 1
        assert rows.dtype == TORCH_DTYPES[entry.dtype], f"{name} is declared {entry.dtype}, the rows are {rows.dtype}"
        assert rows.shape[1:] == entry.shape[1:], f"{name} is declared {entry.shape}, the rows are {tuple(rows.shape)}"
        assert start + count <= entry.num_rows, f"{name}: rows {start} to {start + count} of {entry.shape}"
        memory = memory_of(rows.contiguous())
        _write_all(self._descriptor, memory, self.header.offsets[name] + start * entry.row_bytes)
        self._rows_written[name] = start + count
        self._synced += len(memory)
        if self._synced >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Force what was written to disk, and free the pages that it took."""
        os.fsync(self._descriptor)
        _forget_pages(self._descriptor, 0, 0)
        self._synced = 0

    def commit(self) -> None:
        """Give the finished file its name.  Every declared row must have been written."""
        for name, entry in self.header.entries.items():
            written = self._rows_written[name]
            assert written == entry.num_rows or not entry.num_bytes, f"{self.path}: {written} rows of {entry} written"
        self.sync()
        os.close(self._descriptor)
        self._descriptor = -1
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.commit()
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not self._resumable:
            self.temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".partial")


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def memory_of(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous() and tensor.device.type == "cpu", "rows move between a file and contiguous CPU memory"
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write_all(descriptor: int, memory: memoryview, offset: int) -> None:
    position = 0
    while position < len(memory):
        position += os.pwrite(descriptor, memory[position : position + _LONGEST_CALL], offset + position)


def _forget_pages(descriptor: int, offset: int, length: int) -> None:
    """Let the kernel drop clean pages (``length`` 0: to the end of the file); macOS has no such call."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
