"""A run's checkpoint as a Hugging Face folder, at any time: while the run goes on, after it died, or when it is done.

Only the parameters are read (or their average), into a model made from the run's own record; nothing of the run is
changed, and a checkpoint that the run replaces meanwhile gives an error, never half a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from abyssal.checkpoint.hf import save_model
from abyssal.checkpoint.layout import MAX_SHARD_BYTES, Format
from abyssal.model.lora import LoraConfig, add_lora, merge_lora
from abyssal.model.transformer import Transformer
from abyssal.precision.recipe import Fp8Options, fp8_recipe
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
) -> Exported:
    """Write the model of a checkpoint of ``run``.

    Args:
        destination: must not exist; appears whole or not at all.
        step: of the checkpoint; the newest by default.
        average: the average of the parameters in place of the parameters.

    Raises:
        ValueError: no such run or checkpoint, a run without an average, or a damaged checkpoint.
    """
    folder = RunFolder(run)
    record = _record(folder)
    checkpoint = _checkpoint(folder, step)
    model = _empty_model(record)
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.load(tensors, "model/")
    if average:
        _load_average(model, checkpoint, run)
    if record["origin"].get("lora"):
        merge_lora(model)
    save_model(
        model,
        destination,
        dtype,
        Tokenizer.from_folder(folder.tokenizer),
        include_mtp=include_mtp,
        max_shard_bytes=max_shard_bytes,
    )
    return Exported(checkpoint.step, len(tensors))


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
    """The run's model on the host, its memory not yet filled."""
    spec, config = _spec(record["model"]), record["config"]
    dtype = torch.float64 if config["compute"] == "float64" else torch.float32
    is_fp8 = config.get("precision") == "fp8"  # older runs have no such field
    recipe = fp8_recipe(msgspec.convert(config["fp8"], Fp8Options)) if is_fp8 else None
    model = Transformer(spec, recipe, device="meta", dtype=dtype)
    lora = record["origin"].get("lora")
    model = model.to_empty(device="cpu")
    if lora:
        add_lora(model, msgspec.convert(lora, LoraConfig), torch.Generator())
    return model


def _spec(fields: dict[str, Any]) -> ModelSpec:
    """A spec from the JSON of its fields; which attention it has is the family's."""
    attention = GroupedQueryAttentionSpec if fields["family"] == "llama" else LatentAttentionSpec
    parts = {"attention": attention, "moe": MoESpec, "yarn": YarnSpec}
    made = {name: fields[name] and msgspec.convert(fields[name], kind) for name, kind in parts.items()}
    eos = fields["eos_token_id"]
    return ModelSpec(**{**fields, **made, "eos_token_id": tuple(eos) if isinstance(eos, list) else eos})


def _load_average(model: Transformer, checkpoint: SavedCheckpoint, run: Path) -> None:
    tensors = {f"average/{name}": parameter.data for name, parameter in model.named_parameters()}
    try:
        checkpoint.load(tensors, "average/")
    except ValueError as error:
        if "is missing" in str(error):
            raise ValueError(f"{run}: kept no average of its parameters; leave out --average") from error
        raise
