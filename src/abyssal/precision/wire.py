"""A token on its way between ranks: one row of bytes, its codes and then its scales [V3 section 3.3.3].

Dispatch sends FP8 codes in tiles of 128 channels with power-of-two scales, half the bytes of BF16; combine sends BF16
both ways, which is a tensor of its own dtype and needs nothing from here.  As plain bytes a token can travel by any
transport (gloo knows no FP8 type), in one message instead of one for codes and one for scales, and be gathered, sent
twice or sorted by expert like any other row.  The bytes are those of :func:`~abyssal.kernels.fp8_tiles.quantise`:
nothing is rounded here, so a token's values are the same whether it travelled or stayed.

The trade-off not taken: codes and scales in two tensors, which the fast GPU libraries send.  A row apart from its scale
is what a lost or doubled index would make of it.

Legend: T tokens, X bytes of a token, I channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised
from abyssal.spec.tile_format import SCALE_BYTES, CodeName, ScaleName, TileFormat, tiles_along

_CODES: dict[CodeName, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e5m6": torch.uint8}
_SCALES: dict[ScaleName, torch.dtype] = {"float32": torch.float32, "ue8m0": torch.float8_e8m0fnu}


def bytes_per_token(columns: int, form: TileFormat) -> int:
    """Bytes X of a token of ``columns`` channels.

    Raises:
        ValueError: tiles that are shared between tokens.
    """
    _check_tile(form)
    return form.code_columns(columns) + tiles_along(columns) * SCALE_BYTES[form.scale]


def pack(quantised: Quantised) -> Tensor:
    """(T, X) uint8: the tokens of ``quantised`` (T, I), a contiguous row each.

    Leading axes beyond one are kept.

    Raises:
        ValueError: tiles that are shared between tokens, which no single token could take along.
    """
    _check_tile(quantised.form)
    scales = quantised.scales.clone(
        memory_format=torch.contiguous_format
    )  # also where one tile has a stride of its own
    return torch.cat([quantised.codes.view(torch.uint8), scales.view(torch.uint8)], -1)


def unpack(bytes_TX: Tensor, columns: int, form: TileFormat) -> Quantised:
    """What :func:`pack` packed, to the bit; views of ``bytes_TX``, but for FP32 scales that do not lie on a word.

    Raises:
        ValueError: no bytes, or not those of tokens of ``columns`` channels in ``form``.
    """
    expected = bytes_per_token(columns, form)
    if bytes_TX.dtype is not torch.uint8 or bytes_TX.shape[-1] != expected:
        raise ValueError(
            f"tokens of {columns} channels in {form.code} with {form.scale} scales are rows of {expected} uint8, "
            f"not {tuple(bytes_TX.shape)} of {bytes_TX.dtype}: unpack with the columns and the form they were packed in"
        )
    end_of_codes = form.code_columns(columns)
    codes = _as_dtype(bytes_TX[..., :end_of_codes], _CODES[form.code])
    scales = _as_dtype(bytes_TX[..., end_of_codes:], _SCALES[form.scale])
    return Quantised(codes, scales, form, columns)


def _check_tile(form: TileFormat) -> None:
    if form.tile != "1x128":
        raise ValueError(f"a token travels with its own scales; {form.tile} tiles share theirs: send 1x128 tiles")


def _as_dtype(bytes_TX: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes read as ``dtype``; copied only where an element does not begin on a multiple of its size."""
    size = dtype.itemsize
    aligned = all(place % size == 0 for place in (bytes_TX.storage_offset(), *bytes_TX.stride()[:-1]))
    kept = aligned and bytes_TX.stride(-1) == 1
    return (bytes_TX if kept else bytes_TX.clone(memory_format=torch.contiguous_format)).view(dtype)
