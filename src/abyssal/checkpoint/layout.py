"""How a checkpoint is laid out on disk: the dtype of each tensor, the shards, the index, and writing it row by row.

Saving a model and converting a folder share this: both say where the rows of a tensor come from, and this module says
what files they make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from abyssal.checkpoint.folder import FP8, INDEX_FILE, SINGLE_FILE, row_blocks
from abyssal.checkpoint.names import Piece, scale_name
from abyssal.checkpoint.safetensors_file import TORCH_DTYPES, SafetensorsWriter, sync_folder, temporary_name
from abyssal.checkpoint.safetensors_header import TensorEntry
from abyssal.kernels.fp8_block import BLOCK, block_grid, quantise_blocks

Format = Literal["bf16", "fp32", "fp8"]
"""What linear weights are stored in; what FP8 checkpoints do not quantise is BF16 there."""
FORMATS: tuple[Format, ...] = ("bf16", "fp32", "fp8")
MAX_SHARD_BYTES = 5 << 30
"""Default size of a shard."""

_PLAIN: dict[Format, str] = {"bf16": "BF16", "fp32": "F32", "fp8": "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it will lie on disk, with the scales beside it if it is FP8."""

    weight: TensorEntry
    scales: TensorEntry | None = None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.weight,) if self.scales is None else (self.weight, self.scales)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint and its tensors, in the order in which they are written."""

    file: str
    tensors: tuple[StoredTensor, ...]

    @property
    def entries(self) -> list[TensorEntry]:
        return [entry for tensor in self.tensors for entry in tensor.entries]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


RowSource = Callable[[StoredTensor, int, int], tuple[Tensor, Tensor | None]]
"""Rows [start, stop) of a stored tensor in its stored dtype, and the rows of its scales; start is a multiple of 128."""


def store(piece: Piece, form: Format) -> StoredTensor:
    """How a tensor of the table is stored in a checkpoint of format ``form``."""
    if piece.storage == "float32":
        return StoredTensor(TensorEntry(piece.hf_name, "F32", piece.hf_shape))
    if piece.storage == "block" and form == "fp8":
        return store_fp8(piece.hf_name, piece.hf_shape)
    return StoredTensor(TensorEntry(piece.hf_name, _PLAIN[form], piece.hf_shape))


def store_fp8(name: str, shape: tuple[int, ...], scales_dtype: str = "F32") -> StoredTensor:
    """A weight in FP8 with one scale a block."""
    rows, columns = shape
    return StoredTensor(
        TensorEntry(name, FP8, shape), TensorEntry(scale_name(name), scales_dtype, block_grid(rows, columns))
    )


def encode_rows(stored: StoredTensor, rows: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows in any floating dtype as ``stored`` has them.

    Raises:
        ValueError: naming the tensor, if it is to be FP8 and a value is infinite or NaN.
    """
    if stored.scales is None:
        return rows.to(TORCH_DTYPES[stored.weight.dtype]), None
    try:
        return quantise_blocks(rows, power_of_two)
    except ValueError as error:
        raise ValueError(f"{stored.name} {error}") from None


def check_format(form: str, max_shard_bytes: int) -> Format:
    """The format, or a ValueError that names the argument."""
    if form not in FORMATS:
        raise ValueError(f"dtype is {form!r}: choose one of {', '.join(FORMATS)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}: give a positive number of bytes (5 GiB is {5 << 30})")
    return form  # pyright: ignore[reportReturnType]


def plan_shards(tensors: Sequence[StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Split tensors into files in order; a tensor larger than a shard has one to itself, scales stay beside codes."""
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    total = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(group)) for number, group in enumerate(groups, 1)
    ]


def write_tensor(
    writer: SafetensorsWriter, stored: StoredTensor, rows_of: RowSource, from_row: int = 0
) -> Iterator[tuple[int, int]]:
    """Write a tensor block by block; after each, yield the next row and the bytes just written."""
    for start, stop in row_blocks(stored.weight):
        if start < from_row:
            continue
        weight, scales = rows_of(stored, start, stop)
        writer.write_rows(stored.name, weight)
        written = weight.nbytes
        if stored.scales is not None:
            assert scales is not None, f"{stored.name} is stored with scales"
            writer.write_rows(stored.scales.name, scales)
            written += scales.nbytes
        yield stop, written


def scale_rows(row: int) -> int:
    """Rows of scales that belong to the first ``row`` rows of a weight."""
    return -(-row // BLOCK)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write ``model.safetensors.index.json`` if there is more than one shard."""
    if len(shards) == 1:
        return
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(shard.num_bytes for shard in shards)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    temporary = temporary_name(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def check_finite(stored: StoredTensor, rows: Tensor, file: Path) -> None:
    """Refuse infinities and NaNs, whatever the dtype.

    Raises:
        ValueError: naming the file and the tensor.
    """
    if rows.dtype == torch.float8_e4m3fn:
        finite = bool(((rows.view(torch.uint8) & 0x7F) != 0x7F).all())
    else:
        finite = not rows.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(rows))).all())
    if not finite:
        raise ValueError(f"{file}: {stored.name} holds an infinity or a NaN; repair the weights first")
