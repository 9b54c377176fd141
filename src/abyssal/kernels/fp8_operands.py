"""Quantised tensors as factors of a matrix product: rows by what is summed over, with a scale each 128 of it.

Fprop sums over a weight's inputs, Dgrad over its outputs, Wgrad over tokens [V3 section 3.3, figure 6].  Seen along the
axis that is summed over, all their operands are alike: codes (R, K), and for every row a scale for each 128 columns.  A
128x128 block of a weight gives 128 rows the same scale whichever way it is turned, and tiles of 128x1 are tiles of
1x128 of the transposed tensor.  So the products are written once, and an operand is a view.

Two matrices under a leading axis, as gate and up are stored, lie one after the other along rows; along the sum they are
segments, and tiles begin anew with each.

Legend: R rows, S segments, K summed over within a segment, ``k`` its tiles; T tokens, I inputs, O outputs, E groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from abyssal.kernels.fp8_tiles import Quantised
from abyssal.spec.tile_format import TILE, tiles_along


@dataclass(frozen=True)
class Factor:
    """One side of a product, value = code x scale.

    Attributes:
        codes_RSK: E4M3 or E5M2; any strides.
        scales_RSk: FP32; a view that repeats where rows or tiles share a scale.
        powers_of_two: whether every scale is one.
        uniform: whether each row has one scale along the whole sum.
    """

    codes_RSK: Tensor
    scales_RSk: Tensor
    powers_of_two: bool
    uniform: bool

    @property
    def rows(self) -> int:
        return self.codes_RSK.shape[0]

    @property
    def summed(self) -> int:
        """Values along the sum."""
        return self.codes_RSK.shape[1] * self.codes_RSK.shape[2]

    def take(self, rows: slice) -> Factor:
        """Some of the rows."""
        return replace(self, codes_RSK=self.codes_RSK[rows], scales_RSk=self.scales_RSk[rows])

    def values(self, dtype: torch.dtype) -> Tensor:
        """(R, S·K): code x scale in FP32 (FP64 for FP64), rounded once to ``dtype``."""
        working = torch.float64 if dtype is torch.float64 else torch.float32
        length = self.codes_RSK.shape[2]
        spread_RSK = self.scales_RSk.to(working).repeat_interleave(TILE, -1)[..., :length]
        return (self.codes_RSK.to(working) * spread_RSK).to(dtype).flatten(1)

    def blocks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes (S·k, R, 128), ragged tiles filled up with zeros, and scales (S·k, R), both in ``dtype``."""
        codes_RSK = self.codes_RSK.to(dtype)
        padded = functional.pad(codes_RSK, (0, -codes_RSK.shape[2] % TILE))
        codes = padded.unflatten(2, (-1, TILE)).flatten(1, 2)
        return codes.transpose(0, 1).contiguous(), self.scales_RSk.flatten(1).t().to(dtype).contiguous()


def activation(operand: Quantised, name: str) -> Factor:
    """(T, K) or (T, S, K) summed over its columns, in ``1x128`` tiles or one scale; in ``128x128`` blocks, which are of
    matrices, (T, K) or (S, T, K).

    Raises:
        ValueError: another tile or number of axes; a code that is not multiplied.
    """
    _check(operand, name, ("1x128", "128x128", "tensor"), (2, 3))
    codes, scales = operand.codes, operand.scales.float()
    segments_axis = 1
    if operand.form.tile == "128x128":
        scales = scales.repeat_interleave(TILE, -2)[..., : codes.shape[-2], :]
        segments_axis = 0
    if codes.ndim == 2:
        codes = codes.unsqueeze(segments_axis)
        scales = scales.unsqueeze(segments_axis) if scales.ndim else scales
    if segments_axis == 0:
        codes, scales = codes.transpose(0, 1), scales.transpose(0, 1)
    return _factor(operand, codes, scales)


def weight_rows(operand: Quantised, name: str) -> Factor:
    """(O, I) or (S, O, I) summed over I: S·O rows.

    Raises:
        ValueError: another tile or number of axes; a code that is not multiplied.
    """
    _check(operand, name, ("128x128", "1x128", "tensor"), (2, 3))
    codes, scales = operand.codes, operand.scales.float()
    if operand.form.tile == "128x128":
        scales = scales.repeat_interleave(TILE, -2)[..., : codes.shape[-2], :]
    if codes.ndim == 3:
        codes = codes.flatten(0, 1)
        scales = scales.flatten(0, 1) if scales.ndim else scales
    return _factor(operand, codes.unsqueeze(1), scales.unsqueeze(1) if scales.ndim else scales)


def weight_columns(operand: Quantised, name: str) -> Factor:
    """(O, I) or (S, O, I) summed over O: I rows, S segments.

    Raises:
        ValueError: another tile or number of axes; a code that is not multiplied.
    """
    _check(operand, name, ("128x128", "tensor"), (2, 3))
    codes, scales = operand.codes, operand.scales.float()
    if codes.ndim == 2:
        codes = codes.unsqueeze(0)
        scales = scales.unsqueeze(0) if scales.ndim else scales
    if operand.form.tile == "128x128":
        scales = scales.repeat_interleave(TILE, -1)[..., : codes.shape[-1]].permute(2, 0, 1)
    return _factor(operand, codes.permute(2, 0, 1), scales)


def turned(operand: Quantised, name: str, group: int | None = None) -> Factor:
    """(T, C) in ``128x1`` tiles or one scale, summed over T: C rows.

    Args:
        group: of ``operand.counts``, whose rows alone are summed; None: all rows, which are one group.

    Raises:
        ValueError: another tile or number of axes; a code that is not multiplied; several groups and none named.
    """
    _check(operand, name, ("128x1", "tensor"), (2,))
    codes, scales = operand.codes, operand.scales.float()
    counts = operand.counts or (len(codes),)
    if group is None and len(counts) > 1:
        raise ValueError(f"{name}: tiles of {len(counts)} groups; use grouped_gemm_weight")
    group = group or 0
    start, tile = sum(counts[:group]), sum(map(tiles_along, counts[:group]))
    codes = codes[start : start + counts[group]]
    if operand.form.tile == "128x1":
        scales = scales[tile : tile + tiles_along(counts[group])].t().unsqueeze(1)
    return _factor(operand, codes.t().unsqueeze(1), scales)


def expert(operand: Quantised, index: int) -> Quantised:
    """One of the matrices (or pairs of them) under the first axis."""
    scales = operand.scales[index] if operand.scales.ndim else operand.scales
    return replace(operand, codes=operand.codes[index], scales=scales)


def _factor(operand: Quantised, codes_RSK: Tensor, scales: Tensor) -> Factor:
    rows, segments, length = codes_RSK.shape
    uniform = not scales.ndim or segments * tiles_along(length) <= 1
    if not scales.ndim:
        scales = scales.expand(rows, segments, tiles_along(length))
    return Factor(codes_RSK, scales, operand.form.scale == "ue8m0", uniform)


def _check(operand: Quantised, name: str, tiles: tuple[str, ...], axes: tuple[int, ...]) -> None:
    form, shape = operand.form, tuple(operand.codes.shape)
    if form.code == "e5m6":
        raise ValueError(f"{name}: e5m6 {shape}, which no tensor core multiplies: quantise it to e4m3 or e5m2")
    if form.tile not in tiles:
        raise ValueError(f"{name}: {shape} in {form.tile} tiles: this product wants {' or '.join(tiles)}")
    if len(shape) not in axes:
        raise ValueError(f"{name}: {shape} has {len(shape)} axes: this product wants {' or '.join(map(str, axes))}")
