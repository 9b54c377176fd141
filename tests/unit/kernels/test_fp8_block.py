"""The 128 x 128 block quantiser against its stated bound, its edge cases, and a direct loop over blocks."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels.fp8_block import BLOCK, block_grid, dequantise_blocks, quantise_blocks
from abyssal.spec.tile_format import CODES

E4M3_MAX = CODES["e4m3"].largest
SHAPES = [(128, 128), (1, 1), (127, 129), (256, 384), (300, 200), (576, 130), (3, 140, 260), (2, 2, 129, 1)]


def _per_element(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    full = scales.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return full[..., : shape[-2], : shape[-1]]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30, 3e-37])
def test_every_element_is_within_the_stated_bound(shape: tuple[int, ...], power_of_two: bool, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    # a heavy tail, so that most of each block lies in the subnormal range of its scale
    weight = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
    weight = weight / weight.abs().amax() * magnitude
    codes, scales = quantise_blocks(weight, power_of_two)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (*shape[:-2], *block_grid(*shape[-2:]))
    error = (dequantise_blocks(codes, scales, torch.float64) - weight.double()).abs()
    smallest = 2.0**-10 * (1 + 2.0**-18) * _per_element(scales, shape).double()
    assert (error <= torch.maximum(2.0**-4 * weight.double().abs(), smallest)).all()
    if magnitude >= 1e-30:  # with normal scales the largest element of a block takes the largest codes
        assert codes.float().abs().amax() > (224 if power_of_two else 447)


@pytest.mark.parametrize("shape", [(1, 300, 200), (2, 129, 257)])
def test_equals_a_loop_over_blocks(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales = quantise_blocks(weight)
    for matrix, matrix_codes, matrix_scales in zip(weight, codes, scales, strict=True):
        for i in range(matrix_scales.shape[0]):
            for j in range(matrix_scales.shape[1]):
                block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                scale = matrix[block].abs().max() / E4M3_MAX
                assert scale == matrix_scales[i, j]
                expected = (matrix[block] / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
                assert torch.equal(_bits(expected), _bits(matrix_codes[block].contiguous()))


@pytest.mark.parametrize("rows", [256, 300])
def test_row_blocks_give_the_same_bytes(rows: int) -> None:
    weight = torch.randn(rows, 200, generator=torch.Generator().manual_seed(2))
    codes, scales = quantise_blocks(weight)
    for start in range(0, rows, BLOCK):
        part_codes, part_scales = quantise_blocks(weight[start : start + BLOCK])
        assert torch.equal(_bits(part_codes), _bits(codes[start : start + BLOCK]))
        assert torch.equal(part_scales[0], scales[start // BLOCK])
        part = dequantise_blocks(part_codes, part_scales)
        assert torch.equal(part, dequantise_blocks(codes, scales)[start : start + BLOCK])


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 0.0123, 3e-5, 7.7e20, 2.0**-126])
def test_all_256_codes_come_back(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    values = dequantise_blocks(codes, torch.full((1, 1), scale))
    assert torch.equal(values.isnan(), codes.float().isnan())  # two NaN codes; E4M3 has no infinity
    finite = values.nan_to_num(0.0)
    again, _ = quantise_blocks(finite)
    assert torch.equal(_bits(again)[values.isfinite()], _bits(codes)[values.isfinite()])


def test_power_of_two_scales_are_the_next_power_above() -> None:
    weight = torch.zeros(128, 3 * BLOCK)
    weight[0, 0], weight[0, BLOCK], weight[0, 2 * BLOCK] = E4M3_MAX / 4, E4M3_MAX / 4 + 1e-3, 1.0
    assert quantise_blocks(weight, power_of_two=True)[1].tolist() == [[0.25, 0.5, 2.0**-8]]
    codes, scales = quantise_blocks(torch.randn(128, 256) * 1e-3, power_of_two=True)
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all()
    assert torch.equal(dequantise_blocks(codes, scales.to(torch.float8_e8m0fnu)), dequantise_blocks(codes, scales))


def test_a_block_of_zeros_has_scale_one_and_keeps_the_sign() -> None:
    weight = torch.zeros(130, 130)
    weight[0, 0], weight[129, 129] = -0.0, 5.0
    codes, scales = quantise_blocks(weight)
    assert scales[0, 0] == 1 and scales[0, 1] == 1 and scales[1, 0] == 1 and scales[1, 1] == 5 / torch.tensor(448.0)
    assert torch.equal(dequantise_blocks(codes, scales), weight)
    assert _bits(codes)[0, 0] == 0x80


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_with_their_place(bad: float) -> None:
    weight = torch.ones(300, 300)
    weight[280, 130] = bad
    with pytest.raises(ValueError, match="row 256, column 128"):
        quantise_blocks(weight)


def test_scales_of_another_shape_are_refused() -> None:
    codes, scales = quantise_blocks(torch.ones(130, 130))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        dequantise_blocks(codes, scales[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_weight_dtypes_are_quantised_as_their_fp32_values(dtype: torch.dtype) -> None:
    weight = torch.randn(150, 100, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, scales = quantise_blocks(weight)
    expected_codes, expected_scales = quantise_blocks(weight.float())
    assert torch.equal(_bits(codes), _bits(expected_codes)) and torch.equal(scales, expected_scales)
    assert torch.equal(dequantise_blocks(codes, scales, torch.bfloat16), dequantise_blocks(codes, scales).bfloat16())
