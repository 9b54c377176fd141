"""One model folder into another format, from files to files.

No model is built: tensors pass in row blocks of a few tens of MiB, so a 671B checkpoint converts on a laptop with the
disk for it.  The result does not depend on how often the work was interrupted.  What is written goes to ``DST.partial``
and becomes DST when all of it is there:

    DST.partial/journal     what is being done, and how far it is safely on disk
    DST.partial/model/      the folder in the making

FP8 to FP8 copies codes and scales as they are, and keeps out of FP8 what the source's configuration does.  BF16 to FP8
quantises 128 x 128 blocks; rows are cut at multiples of 128, so the bytes are those of quantising whole matrices.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from abyssal.checkpoint.contents import match
from abyssal.checkpoint.folder import FP8, CheckpointFolder
from abyssal.checkpoint.journal import Journal, Position
from abyssal.checkpoint.layout import (
    MAX_SHARD_BYTES,
    Format,
    Shard,
    StoredTensor,
    check_finite,
    check_format,
    encode_rows,
    plan_shards,
    scale_rows,
    store,
    write_index,
    write_json,
    write_tensor,
)
from abyssal.checkpoint.names import is_derived, scale_name
from abyssal.checkpoint.safetensors_file import TORCH_DTYPES, SafetensorsWriter, sync_folder, temporary_name
from abyssal.checkpoint.weight_formats import left_out_modules, module_name
from abyssal.spec.hf_config import CONFIG_NAME
from abyssal.spec.hf_quantization import BlockQuantization, read_quantization, write_quantization

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

SYNC_BYTES = 256 << 20
"""Bytes after which progress is forced to disk and journalled: what a kill can cost."""

_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".partial")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    num_tensors: int
    num_files: int
    num_bytes: int


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: Format,
    include_mtp: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    sync_bytes: int = SYNC_BYTES,
) -> Conversion:
    """Rewrite the model folder ``source`` as ``destination``; go on where an earlier run of the same task stopped.

    The tokenizer and the other small files of the folder are copied, and ``config.json`` keeps all its fields but those
    of dtype, quantisation and, without MTP, ``num_nextn_predict_layers``.

    Args:
        source: a Hugging Face model folder; every tensor of it is converted, or the conversion is refused.
        destination: must not exist.
        dtype: "bf16", "fp32" or "fp8".
        include_mtp: False leaves the multi-token-prediction modules out.
        max_shard_bytes: size of a file at which the next one is begun.
        progress: is told the bytes written.
        sync_bytes: bytes between two lines of the journal.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: as :func:`abyssal.checkpoint.hf.load_model`, an existing destination, an unfinished conversion of
            another kind in its place, a disk too small, or weights that are infinite or NaN (the tensor is named).
    """
    source, destination, form = Path(source), Path(destination), check_format(dtype, max_shard_bytes)
    partial = Path(os.path.abspath(destination) + ".partial")
    if destination.exists() and not _only_journal(partial):
        raise ValueError(f"{destination}: exists; give another folder, or remove it first")
    with CheckpointFolder(source, drop_cache=True) as folder:
        tensors, config = _plan(folder, form, include_mtp)
        shards = plan_shards(tensors, max_shard_bytes)
        _check_place(partial)
        task = _task(folder, form, include_mtp, max_shard_bytes)
        with Journal(partial / "journal", task) as journal:
            if not destination.exists():
                _make_room(partial / "model", shards)
                try:
                    report = progress or (lambda done, total: None)
                    _write(folder, shards, partial / "model", journal, report, sync_bytes)
                except ValueError:  # the weights are at fault, so a later run has others: nothing here is of use to it
                    shutil.rmtree(partial)
                    raise
                _finish(source, config, shards, partial / "model", destination)
            shutil.rmtree(partial)
    return Conversion(len(tensors), len(shards), sum(shard.num_bytes for shard in shards))


def _plan(folder: CheckpointFolder, form: Format, include_mtp: bool) -> tuple[list[StoredTensor], dict[str, Any]]:
    """What to write for each tensor of the folder, and the new ``config.json``."""
    spec, pieces = match(folder, None if include_mtp else False)
    tensors: list[StoredTensor] = []
    left_out = left_out_modules(folder.config) if form == "fp8" else frozenset()
    for piece in pieces:
        entry = folder.entry(piece.hf_name)
        as_it_is = form == "fp8" and entry.dtype == FP8
        scales = folder.entry(scale_name(piece.hf_name)) if as_it_is else None
        plain = store(piece, "bf16" if module_name(piece.hf_name) in left_out else form)
        tensors.append(StoredTensor(entry, scales) if as_it_is else plain)
    tensors += [StoredTensor(folder.entry(name)) for name in folder.names if is_derived(name)]
    config = dict(folder.config)
    plain = "float32" if form == "fp32" else "bfloat16"
    config |= {field: plain for field in ("torch_dtype", "dtype") if field in config} or {"torch_dtype": plain}
    if form != "fp8":
        config.pop("quantization_config", None)
    elif config.get("quantization_config") is None:
        config["quantization_config"] = write_quantization(BlockQuantization())
    if not spec.mtp_depth:
        config |= {field: 0 for field in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(field)}
    return tensors, config


def _write(
    folder: CheckpointFolder, shards: list[Shard], model: Path, journal: Journal, progress: Progress, sync_bytes: int
) -> None:
    total, done = sum(shard.num_bytes for shard in shards), 0
    quantisation = read_quantization(folder.config)
    power_of_two = quantisation is not None and quantisation.power_of_two_scales

    def rows_of(stored: StoredTensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return _convert_rows(folder, stored, start, stop, power_of_two)

    for number, shard in enumerate(shards):
        if not (model / shard.file).exists():
            for written in _write_shard(model, shard, number, journal, rows_of, sync_bytes):
                progress(done + written, total)
        done += shard.num_bytes
        progress(done, total)


def _write_shard(
    model: Path,
    shard: Shard,
    number: int,
    journal: Journal,
    rows_of: Callable[[StoredTensor, int, int], tuple[Tensor, Tensor | None]],
    sync_bytes: int,
) -> Iterator[int]:
    """Write one file from where the journal left it; yields the bytes of it written so far."""
    start = journal.position
    resumes = (
        start.shard == number and temporary_name(model / shard.file).exists() and (start.tensor, start.row) != (0, 0)
    )
    if not resumes:
        start = Position(number, 0, 0)
    rows = _rows_before(shard, start)
    done = sum(entry.row_bytes * rows.get(entry.name, 0) for entry in shard.entries)
    unsynced = 0
    with SafetensorsWriter(
        model / shard.file, shard.entries, resumable=True, resume=rows if resumes else None
    ) as writer:
        for index, stored in enumerate(shard.tensors[start.tensor :], start.tensor):
            first_row = start.row if index == start.tensor else 0
            for next_row, written in write_tensor(writer, stored, rows_of, first_row):
                done, unsynced = done + written, unsynced + written
                if unsynced >= sync_bytes:
                    writer.sync()
                    journal.record(Position(number, index, next_row))
                    unsynced = 0
                yield done


def _rows_before(shard: Shard, position: Position) -> dict[str, int]:
    """Rows of each tensor of a shard that lie before a position."""
    rows: dict[str, int] = {}
    for index, stored in enumerate(shard.tensors[: position.tensor + 1]):
        count = stored.weight.num_rows if index < position.tensor else position.row
        rows[stored.name] = count
        if stored.scales is not None:
            rows[stored.scales.name] = scale_rows(count)
    return rows


def _convert_rows(
    folder: CheckpointFolder, stored: StoredTensor, start: int, stop: int, power_of_two: bool
) -> tuple[Tensor, Tensor | None]:
    found = folder.entry(stored.name)
    if found.dtype == stored.weight.dtype:
        weight, scales = folder.read_rows(stored.name, start, stop), None
        if stored.scales is not None:
            scales = folder.read_rows(stored.scales.name, scale_rows(start), scale_rows(stop))
    elif found.dtype == FP8:
        weight, scales = folder.decode_rows(stored.name, start, stop, TORCH_DTYPES[stored.weight.dtype]), None
    else:
        weight, scales = encode_rows(stored, folder.read_rows(stored.name, start, stop), power_of_two)
    check_finite(stored, weight, folder.file_of(stored.name))
    return weight, scales


def _finish(source: Path, config: dict[str, Any], shards: list[Shard], model: Path, destination: Path) -> None:
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.name != CONFIG_NAME and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, model / path.name)
    write_index(model, shards)
    write_json(model / CONFIG_NAME, config)
    for path in model.iterdir():
        _sync_file(path)
    sync_folder(model)
    os.rename(model, destination)
    sync_folder(destination.parent)


def _task(folder: CheckpointFolder, form: Format, include_mtp: bool, max_shard_bytes: int) -> dict[str, Any]:
    """What identifies a conversion: the same files, byte for byte as far as sizes and times tell, and the options."""
    states = {path.name: path.stat() for path in [*folder.files, folder.path / CONFIG_NAME]}
    return {
        "version": 1,
        "source": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
        "dtype": form,
        "include_mtp": include_mtp,
        "max_shard_bytes": max_shard_bytes,
    }


def _only_journal(partial: Path) -> bool:
    """Whether a conversion was stopped after its result got its name and before the journal was removed."""
    return (partial / "journal").exists() and not (partial / "model").exists()


def _check_place(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{partial}: cannot be made, a file is in its way; choose another destination") from None
    foreign = sorted(path.name for path in partial.iterdir() if path.name not in ("journal", "model"))
    if foreign or ((partial / "model").exists() and not (partial / "journal").exists()):
        raise ValueError(
            f"{partial}: is there and is no unfinished conversion; remove it or choose another destination"
        )


def _make_room(model: Path, shards: list[Shard]) -> None:
    model.mkdir(exist_ok=True)
    total = sum(shard.num_bytes for shard in shards)
    there = sum(path.stat().st_blocks * 512 for path in model.iterdir())
    free = shutil.disk_usage(model).free
    if free < total - there:
        raise ValueError(
            f"{model.parent}: needs {total - there:,} more bytes and the disk has {free:,} free; make room"
        )


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
