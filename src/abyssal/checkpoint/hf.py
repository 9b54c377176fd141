"""Hugging Face model folders into the model and out of it.

Loading makes the model on the meta device, gives it memory, and streams each tensor from disk into its rows of its
parameter: the memory taken is the weights' own and one row block.  Saving walks the same table the other way.  Experts
are logical on disk and slots in the model: a load fills every slot of an expert, a save writes it once and asserts that
its slots are equal.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from abyssal.checkpoint.contents import check_copies, match
from abyssal.checkpoint.folder import CheckpointFolder
from abyssal.checkpoint.layout import (
    MAX_SHARD_BYTES,
    Format,
    StoredTensor,
    check_format,
    encode_rows,
    plan_shards,
    store,
    write_index,
    write_json,
    write_tensor,
)
from abyssal.checkpoint.names import Piece, check_complete, checkpoint_table
from abyssal.checkpoint.safetensors_file import SafetensorsWriter, sync_folder
from abyssal.checkpoint.weight_formats import WeightFormats
from abyssal.model.experts import Experts
from abyssal.model.lora import lora_parameters
from abyssal.model.transformer import Transformer
from abyssal.spec.hf_config import CONFIG_NAME, write_config
from abyssal.spec.placement import Placement


class SavesTokenizer(Protocol):
    """What a save needs of a tokenizer."""

    def save(self, folder: str | Path) -> None: ...


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mtp: bool | None = None,
    placements: Mapping[int, Placement] | None = None,
    expert_rank: int = 0,
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
        model = Transformer(spec, None, placed, "meta", dtype or folder.dtype(), expert_rank).to_empty(device=device)
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
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise ValueError(f"{folder}: exists; give another folder, or overwrite=True if it is one to be replaced")
    if lora_parameters(model):
        raise ValueError(f"{folder}: the model has adapters; merge_lora(model) first, or save_adapter for them alone")
    table = checkpoint_table(model.spec, include_mtp)
    tensors = model.state_dict()
    slots = _slots(model, tensors)
    _check_table(model, tensors, slots)
    written = {piece.hf_name: piece for piece in table if not piece.optional}
    weights = WeightFormats.of(model, written.values()) if form == "fp8" else None
    stored = [store(piece, form if weights is None else weights.form(piece)) for piece in written.values()]
    shards = plan_shards(stored, max_shard_bytes)

    def rows_of(stored: StoredTensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        region, *replicas = _regions(written[stored.name], tensors, slots)
        rows = region[start:stop]
        for replica in replicas:
            assert torch.equal(rows, replica[start:stop]), f"slots of one expert differ: {stored.name}"
        return encode_rows(stored, rows.cpu(), weights is not None and weights.power_of_two)

    with _whole_folder(folder) as partial:
        for shard in shards:
            with SafetensorsWriter(partial / shard.file, shard.entries) as writer:
                for stored in shard.tensors:
                    for _ in write_tensor(writer, stored, rows_of):
                        pass
        write_index(partial, shards)
        plain = "float32" if form == "fp32" else "bfloat16"
        config = write_config(model.spec, plain, None if weights is None else weights.quantization(), include_mtp)
        if weights is not None:
            weights.complete(config)
        write_json(partial / CONFIG_NAME, config)
        if tokenizer is not None:
            tokenizer.save(partial)


def _fill(model: nn.Module, folder: CheckpointFolder, pieces: tuple[Piece, ...]) -> None:
    adapters = lora_parameters(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
    slots = _slots(model, tensors)
    check_complete(pieces, _logical_shapes(tensors, slots, pieces))
    for piece in sorted(pieces, key=lambda piece: folder.position(piece.hf_name)):
        if piece.copy_of is not None:
            continue
        regions = _regions(piece, tensors, slots)  # none for an expert that lives on another rank
        for region in regions[:1]:
            folder.fill(region, piece.hf_name)
        for replica in regions[1:]:
            replica.copy_(regions[0])


def _regions(piece: Piece, tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The rows of our parameter that a tensor is, once for each slot that holds its expert."""
    parameter = tensors[piece.parameter]
    matrices = (
        [parameter]
        if piece.expert is None
        else [parameter[slot] for slot, expert in enumerate(slots[piece.parameter]) if expert == piece.expert]
    )
    return matrices if piece.rows is None else [matrix[slice(*piece.rows)] for matrix in matrices]


def _slots(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The logical expert of each slot, for each parameter whose module has slots."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    return {name: owner.slots for name, owner in owners.items() if isinstance(owner, Experts)}


def _logical_shapes(
    tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[int, ...]], pieces: tuple[Piece, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters with logical experts, of which a rank may hold a few, as the leading axis."""
    experts: dict[str, int] = {}
    for piece in pieces:
        if piece.expert is not None:
            experts[piece.parameter] = max(experts.get(piece.parameter, 0), piece.expert + 1)
    return {
        name: (experts.get(name, 0), *tensor.shape[1:]) if name in slots else tuple(tensor.shape)
        for name, tensor in tensors.items()
    }


def _check_table(model: Transformer, tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[int, ...]]) -> None:
    full = checkpoint_table(model.spec)
    check_complete(full, _logical_shapes(tensors, slots, full))
    for piece in full:
        if piece.expert is not None and piece.expert not in slots[piece.parameter]:
            raise ValueError(
                f"expert {piece.expert} of {piece.parameter} is in no slot of this model; a model spread over ranks is "
                "saved by its ranks together"
            )


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
