"""Whether the tensors of a folder are those of the model that its ``config.json`` describes.

Everything that can be wrong is found from the headers alone, before a model is allocated or a byte is converted, and
reported as one error that names the first few tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from abyssal.checkpoint.folder import FP8, WEIGHT_DTYPES, CheckpointFolder, listed, row_blocks
from abyssal.checkpoint.names import Piece, belongs_to_mtp, checkpoint_table, is_derived, scale_name
from abyssal.kernels.fp8_block import block_grid
from abyssal.spec.model import ModelSpec

_SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})


def match(folder: CheckpointFolder, mtp: bool | None = None) -> tuple[ModelSpec, tuple[Piece, ...]]:
    """The model that a folder holds and its tensors, after checking that they are all there and fit.

    Args:
        folder: an open folder.
        mtp: True demands the multi-token-prediction modules, False leaves them out, None takes what is there: a folder
            without any of their tensors (transformers saves such) is read without them, with a warning.

    Returns:
        the specification, without MTP where the modules are left out, and the pieces that are in the folder.

    Raises:
        ValueError: one message for all tensors that are missing, unexpected, of another shape, or without scales.
    """
    depth, num_layers = folder.spec.mtp_depth, folder.spec.num_layers
    if mtp and not depth:
        raise ValueError(f"{folder.path}: MTP modules were asked for, but config.json has no num_nextn_predict_layers")
    if mtp is None and depth and not any(belongs_to_mtp(name, num_layers) for name in folder.names):
        warnings.warn(
            f"{folder.path}: num_nextn_predict_layers of config.json is {depth}, but there is no tensor of a layer "
            f"after {num_layers - 1} (transformers does not save them); going on without MTP modules",
            stacklevel=3,
        )
        mtp = False
    spec = replace(folder.spec, mtp_depth=0) if mtp is False and depth else folder.spec
    left_out = tuple(f"model.layers.{layer}." for layer in range(num_layers + spec.mtp_depth, num_layers + depth))
    table = checkpoint_table(spec)
    _check(folder, table, left_out)
    return spec, tuple(piece for piece in table if piece.hf_name in folder)


def check_copies(folder: CheckpointFolder, pieces: Iterable[Piece]) -> None:
    """Check that every copy of the embedding or head (of MTP layers, of tied models) equals the original.

    Raises:
        ValueError: naming the copies that differ, since the model holds one tensor for both.
    """
    copies = [(piece.hf_name, piece.copy_of) for piece in pieces if piece.copy_of in folder.names]
    different = [
        f"{name} is not equal to {original}" for name, original in copies if not _equal(folder, name, original)
    ]
    if different:
        raise ValueError(
            f"{folder.path}: {listed(different)}; the model has one tensor for both: check that the files belong "
            "together, or leave the MTP modules out (mtp=False)"
        )


def _equal(folder: CheckpointFolder, name: str, original: str | None) -> bool:
    assert original is not None
    wide = "F64" in (folder.entry(name).dtype, folder.entry(original).dtype)
    exact = torch.float64 if wide else torch.float32
    return all(
        torch.equal(folder.decode_rows(name, *rows, exact), folder.decode_rows(original, *rows, exact))
        for rows in row_blocks(folder.entry(name))
    )


def _check(folder: CheckpointFolder, table: tuple[Piece, ...], left_out: tuple[str, ...]) -> None:
    problems = [f"{piece.hf_name} is missing" for piece in table if piece.hf_name not in folder and not piece.optional]
    expected: set[str] = set()
    for piece in table:
        expected.add(piece.hf_name)
        if piece.hf_name in folder:
            problems += _misfits(folder, piece)
            if folder.entry(piece.hf_name).dtype == FP8:
                expected.add(scale_name(piece.hf_name))
    problems += [
        f"{name} in {folder.file_of(name).name} is unexpected"
        for name in folder.names
        if name not in expected and not is_derived(name) and not name.startswith(left_out)
    ]
    if problems:
        raise ValueError(
            f"{folder.path}: the tensors are not those of its config.json: {listed(problems)}; check that every file "
            "was fetched whole and that config.json belongs to these weights"
        )


def _misfits(folder: CheckpointFolder, piece: Piece) -> Iterator[str]:
    entry, file = folder.entry(piece.hf_name), folder.file_of(piece.hf_name).name
    if entry.shape != piece.hf_shape:
        yield f"{piece.hf_name} in {file} has shape {list(entry.shape)}, not {list(piece.hf_shape)}"
    elif entry.dtype not in WEIGHT_DTYPES:
        yield f"{piece.hf_name} in {file} has dtype {entry.dtype}, which is none of {', '.join(sorted(WEIGHT_DTYPES))}"
    elif entry.dtype == FP8:
        scales = scale_name(piece.hf_name)
        if len(entry.shape) != 2 or scales not in folder:
            yield f"{piece.hf_name} in {file} is FP8 without its scales {scales}"
            return
        found, grid = folder.entry(scales), block_grid(*entry.shape)
        if found.shape != grid or found.dtype not in _SCALE_DTYPES:
            yield f"{scales} is {found.dtype} {list(found.shape)}, not F32 {list(grid)}"
