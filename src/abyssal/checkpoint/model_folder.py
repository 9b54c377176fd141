"""Weights into a Hugging Face folder, from wherever they are: one writer, and a source that is asked for rows.

A :class:`WeightSource` is a model in memory (:class:`ModelWeights`) or a training checkpoint on disk
(:class:`~abyssal.checkpoint.saved_weights.SavedWeights`).  Rows pass one block at a time, so a folder takes the memory
of its source and some tens of MiB.  Ranks may share the work: each writes whole files of the same plan, so the bytes
do not depend on how many they are, and no rank needs what another has written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from abyssal.checkpoint.layout import (
    Format,
    Shard,
    StoredTensor,
    encode_rows,
    plan_shards,
    store,
    write_index,
    write_json,
    write_tensor,
)
from abyssal.checkpoint.names import Piece, check_complete, checkpoint_table
from abyssal.checkpoint.ranks import Ranks
from abyssal.checkpoint.regions import logical_shapes, regions, slots_of
from abyssal.checkpoint.safetensors_file import SafetensorsWriter, sync_folder
from abyssal.checkpoint.weight_formats import WeightFormats
from abyssal.model.transformer import Transformer
from abyssal.spec.hf_config import CONFIG_NAME, write_config


class SavesTokenizer(Protocol):
    """What a save needs of a tokenizer."""

    def save(self, folder: str | Path) -> None: ...


class WeightSource(Protocol):
    """Where weights are written from."""

    @property
    def model(self) -> Transformer:
        """Whose they are: its spec, and its products with their formats.  Its own parameters need have no values."""
        ...

    def rows(self, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a piece, in host memory and the dtype in which they are kept."""
        ...


class ModelWeights:
    """The weights of a model in memory, which has every expert of every layer in at least one slot.

    Raises:
        ValueError: an expert that is in no slot.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._tensors = model.state_dict()
        self._slots = slots_of(model, self._tensors)
        table = checkpoint_table(model.spec)
        check_complete(table, logical_shapes(self._tensors, self._slots, table))
        for piece in table:
            if piece.expert is not None and piece.expert not in self._slots[piece.parameter]:
                raise ValueError(
                    f"expert {piece.expert} of {piece.parameter} is in no slot of this model; a model spread over "
                    "ranks is saved by its ranks together"
                )

    @property
    def model(self) -> Transformer:
        return self._model

    def rows(self, piece: Piece, start: int, stop: int) -> Tensor:
        region, *replicas = regions(piece, self._tensors, self._slots)
        rows = region[start:stop]
        for replica in replicas:
            assert torch.equal(rows, replica[start:stop]), f"slots of one expert differ: {piece.hf_name}"
        return rows.cpu()


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is written; what each field means is said at :func:`~abyssal.checkpoint.hf.save_model`."""

    form: Format
    tokenizer: SavesTokenizer | None
    include_mtp: bool
    max_shard_bytes: int
    overwrite: bool = False


def write_model_folder(
    source: WeightSource,
    folder: Path,
    options: FolderOptions,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Write ``folder``, which appears whole or not at all.

    Args:
        source: alike on all ranks.
        folder: absolute; must not exist, unless it is to be overwritten.
        group: over gloo, whose ranks share the work and return together; by default this process does all.

    Raises:
        ValueError: a folder in the way, a recipe whose scales no FP8 checkpoint holds, or a weight that cannot be FP8.
    """
    ranks = Ranks(group)
    ranks.together(lambda: _write(source, folder, options, ranks))


def _write(source: WeightSource, folder: Path, options: FolderOptions, ranks: Ranks) -> None:
    ranks.first(lambda: check_free(folder, options.overwrite))
    plan = ranks.together(lambda: _Plan(source, options))
    with ExitStack() as stack:
        partial = ranks.first(lambda: stack.enter_context(_whole_folder(folder)))
        ranks.together(lambda: plan.write_shards(partial, ranks))
        if ranks.is_first:
            write_index(partial, plan.shards)
            write_json(partial / CONFIG_NAME, plan.config())
            if options.tokenizer is not None:
                options.tokenizer.save(partial)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is there already.

    Raises:
        ValueError: it exists and is not to be overwritten.
    """
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise ValueError(f"{folder}: exists; give another folder, or overwrite=True if it is one to be replaced")


class _Plan:
    """What lies where in the folder."""

    def __init__(self, source: WeightSource, options: FolderOptions) -> None:
        self._source = source
        self._options = options
        form, spec = options.form, source.model.spec
        table = checkpoint_table(spec, options.include_mtp)
        self._pieces = {piece.hf_name: piece for piece in table if not piece.optional}
        self._weights = WeightFormats.of(source.model, self._pieces.values()) if form == "fp8" else None
        forms = self._weights
        stored = [store(piece, form if forms is None else forms.form(piece)) for piece in self._pieces.values()]
        self.shards = plan_shards(stored, options.max_shard_bytes)

    def write_shards(self, partial: Path, ranks: Ranks) -> None:
        """Write the files that are this rank's."""
        for shard in self.shards[ranks.rank :: ranks.size]:
            self._write_shard(partial, shard)

    def _write_shard(self, partial: Path, shard: Shard) -> None:
        with SafetensorsWriter(partial / shard.file, shard.entries) as writer:
            for stored in shard.tensors:
                for _ in write_tensor(writer, stored, self._rows):
                    pass

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        rows = self._source.rows(self._pieces[stored.name], start, stop)
        return encode_rows(stored, rows, self._weights is not None and self._weights.power_of_two)

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        plain = "float32" if self._options.form == "fp32" else "bfloat16"
        quantization = None if self._weights is None else self._weights.quantization()
        config = write_config(self._source.model.spec, plain, quantization, self._options.include_mtp)
        if self._weights is not None:
            self._weights.complete(config)
        return config


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block ends well and is removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this number: containers repeat them
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
