"""Block-scaled matrix products of FP8 operands: Fprop, Dgrad and Wgrad of a Linear [V3 section 3.3, figures 6 and 7].

What they mean: codes are multiplied and added up within 128 of what is summed over, each such partial sum is multiplied
by its two scales, and those are added up in FP32.  ``summation`` says how that is done:

``float32``     operands dequantised and one ordinary product, which is how a CPU does it fastest: in BF16 where scales
                are powers of two (values are exact in BF16 then), the result is BF16 and the processor multiplies
                BF16; in FP32 else.
``blocks``      the definition, block by block in FP32: the reference of ``float32`` and of GPU kernels.
``promoted``    partial sums as Hopper's tensor cores make them (:mod:`~abyssal.kernels.tensor_core`).
``tensor_core`` so, without promotion: one register over the whole sum.
``float64``     the definition in FP64, for tests and measurements.

FP8 on a CPU is emulation and never faster than the product that it stands for.

A NaN tile (:mod:`~abyssal.kernels.fp8_tiles`) makes every output NaN that it has part in, and no other.  Error bounds:
:mod:`~abyssal.kernels.fp8_bounds`.

A pair of weights of one product (gate and up: (2, F, D), tiles beginning anew with each) gives outputs (T, 2F); its
gradient in Dgrad is quantised as (T, 2, F), whose tiles begin anew there too ((2, T, F) in 128x128 blocks, which are of
matrices).

Legend: T tokens, I inputs, O outputs, E groups, M rows of a group at most, F half of the outputs of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from abyssal.kernels.fp8_operands import Factor, activation, expert, turned, weight_columns, weight_rows
from abyssal.kernels.fp8_tiles import Quantised
from abyssal.kernels.matmul import matmul, multiplies_bf16
from abyssal.kernels.tensor_core import promoted_product, tensor_core_product

Summation = Literal["float32", "blocks", "promoted", "tensor_core", "float64"]


def gemm(a_TI: Quantised, b_OI: Quantised, out_dtype: torch.dtype, summation: Summation = "float32") -> Tensor:
    """y_TO = a bᵀ (Fprop).

    Args:
        a_TI: (T, I), tiles of ``1x128`` (or ``128x128``, or one scale).
        b_OI: (O, I) or, a pair, (2, F, I) with O = 2F; ``128x128`` blocks or one scale.

    Raises:
        ValueError: operands that do not fit each other.
    """
    return _product(activation(a_TI, "a"), weight_rows(b_OI, "b"), out_dtype, summation, _shapes(a=a_TI, b=b_OI))


def gemm_input(
    dy_TO: Quantised, weight_OI: Quantised, out_dtype: torch.dtype, summation: Summation = "float32"
) -> Tensor:
    """dx_TI = dy W (Dgrad).

    Args:
        dy_TO: (T, O) or, for a pair, (T, 2, F) or, in 128x128 blocks, (2, T, F); tiles as ``a`` of :func:`gemm`.
        weight_OI: (O, I) or (2, F, I), ``128x128`` blocks or one scale.

    Raises:
        ValueError: operands that do not fit each other.
    """
    shapes = _shapes(dy=dy_TO, weight=weight_OI)
    return _product(activation(dy_TO, "dy"), weight_columns(weight_OI, "weight"), out_dtype, summation, shapes)


def gemm_weight(
    dy_TO: Quantised, x_TI: Quantised, summation: Summation = "float32", out_OI: Tensor | None = None
) -> Tensor:
    """dW_OI = dyᵀ x (Wgrad), in FP32 (FP64 for ``float64``); added to ``out_OI`` where given, which is returned.

    Args:
        dy_TO, x_TI: (T, O) and (T, I), tiles of ``128x1`` or one scale.

    Raises:
        ValueError: operands that do not fit each other.
    """
    shapes = _shapes(dy=dy_TO, x=x_TI)
    dw_OI = _product(turned(dy_TO, "dy"), turned(x_TI, "x"), _weight_dtype(summation), summation, shapes)
    return dw_OI if out_OI is None else _checked_out(out_OI, dw_OI.shape).add_(dw_OI)


def grouped_gemm(
    a_TI: Quantised,
    b_EOI: Quantised,
    counts: Sequence[int],
    out_dtype: torch.dtype,
    summation: Summation = "float32",
) -> Tensor:
    """y_TO: :func:`gemm` of each group's rows, which follow each other in ``a_TI``, by its weight.

    Args:
        b_EOI: (E, O, I) or (E, 2, F, I).
        counts: rows of each group; groups may be empty.

    Raises:
        ValueError: operands or counts that do not fit.
    """
    return _contiguous(
        activation(a_TI, "a"), b_EOI, counts, weight_rows, out_dtype, summation, _shapes(a=a_TI, b=b_EOI)
    )


def grouped_gemm_input(
    dy_TO: Quantised,
    weight_EOI: Quantised,
    counts: Sequence[int],
    out_dtype: torch.dtype,
    summation: Summation = "float32",
) -> Tensor:
    """dx_TI: :func:`gemm_input` of each group's rows by its weight.

    ``128x128`` blocks of gradients are those of all rows, across the borders of groups.

    Raises:
        ValueError: operands or counts that do not fit.
    """
    shapes = _shapes(dy=dy_TO, weight=weight_EOI)
    return _contiguous(activation(dy_TO, "dy"), weight_EOI, counts, weight_columns, out_dtype, summation, shapes)


def masked_gemm(
    a_EMI: Quantised,
    b_EOI: Quantised,
    masked_m_E: Tensor | Sequence[int],
    out_dtype: torch.dtype,
    summation: Summation = "float32",
) -> Tensor:
    """y_EMO: :func:`gemm` of the first ``masked_m_E[e]`` rows of each group, as decoding's fixed buffers have them.

    Rows beyond are not read and come back as zero.

    Args:
        a_EMI: (E, M, I) in ``1x128`` tiles, or one scale.
        b_EOI: (E, O, I) or (E, 2, F, I).

    Raises:
        ValueError: operands or numbers of rows that do not fit.
    """
    shapes = _shapes(a=a_EMI, b=b_EOI)
    rows_E = [int(count) for count in masked_m_E]
    if a_EMI.codes.ndim != 3 or len(a_EMI.codes) != len(rows_E):
        raise ValueError(f"{shapes}, masked_m {rows_E[:8]}: a must be (E, M, I), with a number of rows a group")
    groups, most, inputs = a_EMI.codes.shape
    if not all(0 <= count <= most for count in rows_E):
        raise ValueError(f"{shapes}, masked_m {rows_E[:8]}: no group has fewer rows than none or more than {most}")
    outputs = _outputs(b_EOI, groups, inputs, weight_rows, shapes)
    y_EMO = torch.zeros(groups, most, outputs, dtype=out_dtype, device=a_EMI.codes.device)
    for group, count in enumerate(rows_E):
        if count:
            a = activation(expert(a_EMI, group), "a").take(slice(0, count))
            b = weight_rows(expert(b_EOI, group), "b")
            y_EMO[group, :count] = _product(a, b, out_dtype, summation, shapes)
    return y_EMO


def grouped_gemm_weight(
    dy_TO: Quantised,
    x_TI: Quantised,
    counts: Sequence[int],
    summation: Summation = "float32",
    out_EOI: Tensor | None = None,
) -> Tensor:
    """dW_EOI: :func:`gemm_weight` of each group's rows (K-grouped); zero for a group without rows.

    Args:
        dy_TO, x_TI: tiles of ``128x1`` that begin anew with each group (``counts`` as they were quantised with), or
            one scale.
        out_EOI: what the gradients are added to, and returned.

    Raises:
        ValueError: operands or counts that do not fit.
    """
    shapes = _shapes(dy=dy_TO, x=x_TI)
    groups = tuple(counts)
    for name, operand in (("dy", dy_TO), ("x", x_TI)):
        own = operand.counts or ((len(operand.codes),) if operand.form.tile == "128x1" else groups)
        if own != groups or sum(groups) != len(operand.codes):
            raise ValueError(
                f"{shapes}, counts {list(groups[:8])}: {name} is of groups of {list(own[:8])} rows; quantise both with "
                "the counts of the product"
            )
    dy_TO, x_TI = (_with_counts(operand, groups) for operand in (dy_TO, x_TI))
    expected = len(groups), dy_TO.codes.shape[-1], x_TI.codes.shape[-1]
    if out_EOI is None:
        out_EOI = torch.zeros(expected, device=x_TI.codes.device, dtype=_weight_dtype(summation))
    _checked_out(out_EOI, expected)
    for group, count in enumerate(groups):
        if count:
            dy, x = turned(dy_TO, "dy", group), turned(x_TI, "x", group)
            out_EOI[group] += _product(dy, x, out_EOI.dtype, summation, shapes)
    return out_EOI


def _float32(a: Factor, b: Factor, out_dtype: torch.dtype) -> Tensor:
    """Dequantise, and one ordinary product."""
    exact_in_bf16 = a.powers_of_two and b.powers_of_two
    on_bf16 = out_dtype is torch.bfloat16 and exact_in_bf16 and (multiplies_bf16() or not a.codes_RSK.is_cpu)
    dtype = torch.bfloat16 if on_bf16 else torch.float32
    return matmul(a.values(dtype), b.values(dtype).t())


def _blocks(a: Factor, b: Factor, dtype: torch.dtype) -> Tensor:
    """The definition, added up in ``dtype``."""
    codes_a, scales_a = a.blocks(dtype)
    codes_b, scales_b = b.blocks(dtype)
    total = codes_a.new_zeros(a.rows, b.rows)
    for block in range(len(codes_a)):
        partial = codes_a[block] @ codes_b[block].t()
        total += partial * (scales_a[block].unsqueeze(1) * scales_b[block])
    return total


_SUMMATIONS: dict[Summation, Callable[[Factor, Factor, torch.dtype], Tensor]] = {
    "float32": _float32,
    "blocks": lambda a, b, _: _blocks(a, b, torch.float32),
    "promoted": lambda a, b, _: promoted_product(a, b),
    "tensor_core": lambda a, b, _: tensor_core_product(a, b),
    "float64": lambda a, b, _: _blocks(a, b, torch.float64),
}


def _product(a: Factor, b: Factor, out_dtype: torch.dtype, summation: Summation, shapes: str) -> Tensor:
    if a.codes_RSK.shape[1:] != b.codes_RSK.shape[1:]:
        raise ValueError(
            f"{shapes}: they are summed over {_segments(a)} and {_segments(b)} values, which must be the same"
        )
    if summation not in _SUMMATIONS:
        raise ValueError(f"summation is {summation!r}: choose one of {', '.join(_SUMMATIONS)}")
    if not a.summed:
        return torch.zeros(a.rows, b.rows, dtype=out_dtype, device=a.codes_RSK.device)
    return _SUMMATIONS[summation](a, b, out_dtype).to(out_dtype)


def _contiguous(
    a: Factor,
    weights: Quantised,
    counts: Sequence[int],
    as_factor: Callable[[Quantised, str], Factor],
    out_dtype: torch.dtype,
    summation: Summation,
    shapes: str,
) -> Tensor:
    if sum(counts) != a.rows or min(counts, default=0) < 0:
        raise ValueError(f"{shapes}, counts {list(counts[:8])}: they must add up to the {a.rows} rows")
    outputs = _outputs(weights, len(counts), a.summed, as_factor, shapes)
    y_TO = torch.empty(a.rows, outputs, dtype=out_dtype, device=a.codes_RSK.device)
    for group, rows in _ranges(counts):
        weight = as_factor(expert(weights, group), "weight")
        y_TO[rows] = _product(a.take(rows), weight, out_dtype, summation, shapes)
    return y_TO


def _outputs(
    weights: Quantised, groups: int, summed: int, as_factor: Callable[[Quantised, str], Factor], shapes: str
) -> int:
    """Outputs of each group's weight, which must sum over ``summed`` values."""
    first, *rows, columns = weights.codes.shape
    if first != groups or len(rows) not in (1, 2):
        raise ValueError(f"{shapes}: weights must be (E, O, I) or (E, 2, F, I), one for each of {groups} groups")
    outputs, own = (prod(rows), columns) if as_factor is weight_rows else (columns, prod(rows))
    if own != summed:
        raise ValueError(f"{shapes}: they are summed over {summed} and {own} values, which must be the same")
    return outputs


def _ranges(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, with its rows."""
    start = 0
    for group, count in enumerate(counts):
        if count:
            yield group, slice(start, start + count)
        start += count


def _with_counts(operand: Quantised, counts: tuple[int, ...]) -> Quantised:
    return Quantised(operand.codes, operand.scales, operand.form, operand.columns, counts)


def _checked_out(out: Tensor, expected: Sequence[int]) -> Tensor:
    if tuple(out.shape) != tuple(expected) or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out: {tuple(out.shape)} in {out.dtype} must be {tuple(expected)} in FP32 or FP64")
    return out


def _weight_dtype(summation: Summation) -> torch.dtype:
    return torch.float64 if summation == "float64" else torch.float32


def _segments(factor: Factor) -> str:
    segments, length = factor.codes_RSK.shape[1:]
    return str(length) if segments == 1 else f"{segments} x {length}"


def _shapes(**operands: Quantised) -> str:
    return ", ".join(f"{name} {tuple(operand.codes.shape)}" for name, operand in operands.items())
