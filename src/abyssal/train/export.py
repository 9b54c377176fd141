"""A run's checkpoint as a Hugging Face folder, at any time: while the run goes on, after it died, or when it is done.

Only the parameters are read (or their average), row by row from the checkpoint's files into those of the folder, so
that the memory of a few rows is enough for any model, and ranks may share the work.  Nothing of the run is changed, and
a checkpoint that the run replaces meanwhile gives an error, never half a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, distributed

from abyssal.checkpoint.adapters import save_adapter
from abyssal.checkpoint.layout import MAX_SHARD_BYTES, Format, check_format
from abyssal.checkpoint.model_folder import FolderOptions, write_model_folder
from abyssal.checkpoint.ranks import Ranks
from abyssal.checkpoint.saved_weights import AVERAGE, PARAMETERS, SavedWeights, attach_saved_adapters
from abyssal.checkpoint.sharded import save_sharded
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.checkpoint.shards import Sharded
from abyssal.checkpoint.whole_folder import remove
from abyssal.model.lora import LoraConfig
from abyssal.model.transformer import Transformer
from abyssal.precision.recipe import Fp8Options, fp8_recipe
from abyssal.spec.hf_config import read_config
from abyssal.spec.model import GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec, MoESpec, YarnSpec
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.checkpoints import SavedCheckpoint, saved_checkpoints
from abyssal.train.folder import RunFolder


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    num_tensors: int


def export_checkpoint(
    run: Path,
    destination: Path,
    dtype: Format,
    step: int | None = None,
    average: bool = False,
    include_mtp: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: distributed.ProcessGroup | None = None,
) -> Exported:
    """Write the model of a checkpoint of ``run``.

    Args:
        destination: must not exist; appears whole or not at all.
        step: of the checkpoint; the newest by default.
        average: the average of the parameters in place of the parameters.
        group: over gloo, whose ranks share the work and return together.

    Raises:
        ValueError: no such run or checkpoint, a run without an average, or a damaged checkpoint.
    """
    folder, ranks = RunFolder(run), Ranks(group)
    options = FolderOptions(check_format(dtype, max_shard_bytes), None, include_mtp, max_shard_bytes)
    record = ranks.first(lambda: _record(folder))
    checkpoint = ranks.first(lambda: _checkpoint(folder, step))
    with ExitStack() as stack:
        saved = ranks.together(lambda: stack.enter_context(_SavedRun(folder, record, checkpoint.path)))
        saved.reader.check_files(ranks)
        saved.write(destination, options, group, average)
    return Exported(checkpoint.step, len(saved.model.state_dict()))


def save_result_from_state(
    folder: RunFolder,
    step: int,
    tensors: Mapping[str, Tensor | Sharded],
    form: Format,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """What a run leaves, of a model that no rank holds whole; each folder whole or not at all.

    RUN/model, and RUN/model-average where the run kept one; of adapters RUN/adapter too, and RUN/base where the
    vocabulary had to grow.  They are written from the run's checkpoint of ``step``, or, where none was saved, from one
    that is saved for the purpose and removed.

    Args:
        folder: with its record and its tokenizer.
        step: at which the run ended.
        tensors: the run's state then, what this rank gives of it (``Trainer.tensors``).
        form: of the weights.
        group: over gloo, whose ranks share the work and return together.

    Raises:
        ValueError, OSError: what could not be read or written, on all ranks.
    """
    ranks = Ranks(group)
    saved = ranks.first(lambda: [one.path for one in saved_checkpoints(folder.checkpoints) if one.step == step])
    own = folder.path / ".result"
    if not saved:
        model = {name: one for name, one in tensors.items() if name.startswith((PARAMETERS, AVERAGE))}
        save_sharded(own, model, {}, group)
    try:
        _write_result(folder, saved[0] if saved else own, form, group)
    finally:
        if not saved and ranks.is_first:
            remove(own)


def _write_result(folder: RunFolder, checkpoint: Path, form: Format, group: distributed.ProcessGroup | None) -> None:
    ranks = Ranks(group)
    with ExitStack() as stack:
        saved = ranks.together(lambda: stack.enter_context(_SavedRun(folder, _record(folder), checkpoint)))
        saved.reader.check_files(ranks)
        options = FolderOptions(form, None, True, MAX_SHARD_BYTES, overwrite=True)
        if saved.lora is not None:
            ranks.first(saved.write_adapter)
            if ranks.first(saved.has_grown):
                saved.write(saved.own_base, replace(options, form="fp32"), group, merge=False)
        saved.write(folder.model, options, group)
        if saved.has_average:
            saved.write(folder.average, options, group, average=True)


class _SavedRun:
    """A checkpoint of a run, open, with the run's model, whose parameters have no values.  A context manager."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], checkpoint: Path) -> None:
        self._folder = folder
        lora = record["origin"].get("lora")
        self.lora = None if lora is None else msgspec.convert(lora, LoraConfig)
        self._base = record["origin"].get("folder")
        self.own_base = folder.path / "base"
        self.model = _empty_model(record)
        self.reader = ShardedReader(checkpoint)
        if self.lora is not None:
            attach_saved_adapters(self.model, self.reader, self.lora.rank, self.lora.alpha)

    @property
    def has_average(self) -> bool:
        return any(name.startswith(AVERAGE) for name in self.reader.tensors)

    def has_grown(self) -> bool:
        """Whether the vocabulary had to, so that the base model is no longer the one that the run began from."""
        return self.model.spec.vocab_size > read_config(Path(self._base)).vocab_size

    def write(
        self,
        destination: Path,
        options: FolderOptions,
        group: distributed.ProcessGroup | None,
        average: bool = False,
        merge: bool = True,
    ) -> None:
        """The model, or its average, with its adapters folded in or left out."""
        ranks = Ranks(group)
        if average and not self.has_average:
            raise ValueError(f"{self._folder.path}: kept no average of its parameters; leave out --average")
        weights = ranks.together(lambda: SavedWeights(self.reader, self.model, average, merge))
        tokenizer = ranks.together(lambda: Tokenizer.from_folder(self._folder.tokenizer))
        options = replace(options, tokenizer=tokenizer)
        write_model_folder(weights, Path(os.path.abspath(destination)), options, group)

    def write_adapter(self) -> None:
        """The adapters by themselves, in PEFT's format."""
        base = self.own_base if self.has_grown() else self._base
        adapters = SavedWeights(self.reader, self.model, merge=False)
        destination = self._folder.path / "adapter"
        save_adapter(self.model, destination, str(base), overwrite=True, source=adapters.adapter)

    def __enter__(self) -> _SavedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def _record(folder: RunFolder) -> dict[str, Any]:
    try:
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("model", "config", "origin")}
    except FileNotFoundError:
        raise ValueError(
            f"{folder.path}: holds no run.json, so it is no run; give the --out of abyssal train"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder.record}: is not the record of a run ({error!r})") from error


def _checkpoint(folder: RunFolder, step: int | None) -> SavedCheckpoint:
    saved = saved_checkpoints(folder.checkpoints)
    if not saved:
        raise ValueError(f"{folder.path}: has no checkpoint yet; wait for --save-every steps, or copy RUN/model")
    if step is None:
        return saved[-1]
    for checkpoint in saved:
        if checkpoint.step == step:
            return checkpoint
    there = ", ".join(str(checkpoint.step) for checkpoint in saved)
    raise ValueError(f"{folder.path}: has no checkpoint of step {step}; choose one of {there}")


def _empty_model(record: dict[str, Any]) -> Transformer:
    """The run's model on the meta device."""
    spec, config = _spec(record["model"]), record["config"]
    dtype = torch.float64 if config["compute"] == "float64" else torch.float32
    is_fp8 = config.get("precision") == "fp8"  # older runs have no such field
    recipe = fp8_recipe(msgspec.convert(config["fp8"], Fp8Options)) if is_fp8 else None
    return Transformer(spec, recipe, device="meta", dtype=dtype)


def _spec(fields: dict[str, Any]) -> ModelSpec:
    """A spec from the JSON of its fields; which attention it has is the family's."""
    attention = GroupedQueryAttentionSpec if fields["family"] == "llama" else LatentAttentionSpec
    parts = {"attention": attention, "moe": MoESpec, "yarn": YarnSpec}
    made = {name: fields[name] and msgspec.convert(fields[name], kind) for name, kind in parts.items()}
    eos = fields["eos_token_id"]
    return ModelSpec(**{**fields, **made, "eos_token_id": tuple(eos) if isinstance(eos, list) else eos})
