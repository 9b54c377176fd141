"""Hugging Face model folders into the model and out of it.

Loading makes the model on the meta device, gives it memory, and streams each tensor from disk into its rows of its
parameter: the memory taken is the weights' own and one row block.  Saving walks the same table the other way.  Experts
are logical on disk and slots in the model: a load fills every slot of an expert, a save writes it once and asserts that
its slots are equal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from abyssal.checkpoint.contents import check_copies, match
from abyssal.checkpoint.folder import CheckpointFolder
from abyssal.checkpoint.layout import MAX_SHARD_BYTES, Format, check_format
from abyssal.checkpoint.model_folder import (
    FolderOptions,
    ModelWeights,
    SavesTokenizer,
    check_free,
    write_model_folder,
)
from abyssal.checkpoint.names import Piece, check_complete, checkpoint_table
from abyssal.checkpoint.regions import logical_shapes, regions, slots_of
from abyssal.model.lora import lora_parameters
from abyssal.model.part import ModelPart
from abyssal.model.transformer import Transformer
from abyssal.spec.placement import Placement


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mtp: bool | None = None,
    placements: Mapping[int, Placement] | None = None,
    expert_rank: int = 0,
    part: ModelPart | None = None,
) -> Transformer:
    """The model of a folder, with its weights.

    Args:
        path: a folder with ``config.json`` and safetensors, in BF16, FP16, FP32 or DeepSeek's block-scaled FP8.
        dtype: of the parameters; the checkpoint's own by default (BF16 for FP8).
        device: where the parameters are.
        mtp: True demands the multi-token-prediction modules, False leaves them out, None takes what is there.
        placements: by layer, where the routed experts are; those of MTP modules that are left out are not needed.
        expert_rank: which of the placements' ranks this is: the model holds the experts in that rank's slots, and the
            others stay on the disk.
        part: the layers to hold, where a pipeline spreads them; the others stay on the disk too.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: a configuration that is not supported, broken or missing files, tensors that are missing, unexpected
            or mis-shaped, FP8 without scales, MTP copies that differ; one message that names them.  Nothing is
            allocated before all but the last are checked.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}: parameters are bfloat16, float16, float32 or float64")
    with CheckpointFolder(path) as folder:
        spec, pieces = match(folder, mtp)
        check_copies(folder, pieces)
        layers = folder.spec.num_layers + spec.mtp_depth
        placed = {layer: placement for layer, placement in (placements or {}).items() if layer < layers}
        where = {"dtype": dtype or folder.dtype(), "expert_rank": expert_rank, "part": part}
        model = Transformer(spec, None, placed, device, **where)
        _fill(model, folder, pieces)
    return model


def load_weights(model: Transformer, path: str | Path) -> None:
    """Fill a model's parameters from a folder; the folder's MTP modules are left out if the model has none.

    Raises:
        ValueError: as :func:`load_model`; also a folder of another model than ``model.spec``.
    """
    with CheckpointFolder(path) as folder:
        _, pieces = match(folder, model.spec.mtp_depth > 0)
        found = {piece.hf_name: piece.hf_shape for piece in pieces if not piece.optional}
        wanted = {piece.hf_name: piece.hf_shape for piece in checkpoint_table(model.spec) if not piece.optional}
        if found != wanted:
            name = next(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise ValueError(
                f"{path}: holds another model than the one to be filled: {name} has shape {found.get(name)} and not "
                f"{wanted.get(name)} (None: no such tensor); make the model with load_model"
            )
        check_copies(folder, pieces)
        _fill(model, folder, pieces)


def save_model(
    model: Transformer,
    folder: str | Path,
    dtype: Format = "bf16",
    tokenizer: SavesTokenizer | None = None,
    include_mtp: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face folder: weights, ``config.json``, and the tokenizer if given.

    The folder appears whole or not at all: it is written beside its place and renamed.

    "fp8" of a model whose recipe is FP8 writes the codes and scales that its products multiply by, and leaves in BF16
    the weights of products that its recipe keeps out of FP8; what is loaded is what was trained.

    Args:
        model: every expert of every layer in at least one slot.
        folder: must not exist, unless ``overwrite``.
        dtype: "bf16", "fp32", or "fp8" (linear weights in 128 x 128 blocks, the rest BF16).
        tokenizer: saved into the folder too.
        include_mtp: False leaves the MTP modules out (transformers then finds no tensor that it does not know).
        max_shard_bytes: size of a file at which the next one is begun.
        overwrite: replace an existing folder, whose old contents are removed last.

    Raises:
        ValueError: an argument, adapters that are not merged, a recipe whose scales no FP8 checkpoint holds, or a
            weight that is infinite or NaN and cannot be FP8, by name.
    """
    folder, form = Path(os.path.abspath(folder)), check_format(dtype, max_shard_bytes)
    check_free(folder, overwrite)
    if lora_parameters(model):
        raise ValueError(f"{folder}: the model has adapters; merge_lora(model) first, or save_adapter for them alone")
    options = FolderOptions(form, tokenizer, include_mtp, max_shard_bytes, overwrite)
    write_model_folder(ModelWeights(model), folder, options)


def _fill(model: nn.Module, folder: CheckpointFolder, pieces: tuple[Piece, ...]) -> None:
    adapters = lora_parameters(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
    slots = slots_of(model, tensors)
    check_complete(pieces, logical_shapes(tensors, slots, pieces))
    for piece in sorted(pieces, key=lambda piece: folder.position(piece.hf_name)):
        if piece.copy_of is not None:
            continue
        targets = regions(piece, tensors, slots)  # none for an expert that lives on another rank
        if targets and targets[0].is_meta:
            continue  # a layer that lives on another rank
        for target in targets[:1]:
            folder.fill(target, piece.hf_name)
        for replica in targets[1:]:
            replica.copy_(targets[0])
