"""DeepSeek's block-scaled FP8 in a ``config.json``: ``quantization_config``, read and written.

A quantised weight is ``weight`` in float8_e4m3fn beside ``weight_scale_inv`` in FP32, one scale a 128x128 block
(DeepSeek-V3's repository).  ``scale_fmt: ue8m0`` (V3.1) says that the scales are powers of two; they are stored in FP32
all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abyssal.spec.hf_fields import Fields

HARMLESS = frozenset({"modules_to_not_convert", "ignored_layers", "dequantize"})
"""Which modules are quantised is read off the tensors themselves: a quantised weight has its scales beside it."""


@dataclass(frozen=True)
class BlockQuantization:
    """Weights in E4M3 with one scale a block, activations quantised as they come."""

    block_size: tuple[int, int] = (128, 128)
    """Rows and columns that share a scale."""
    power_of_two_scales: bool = False
    """Whether the scales are powers of two (``scale_fmt: ue8m0``)."""


def parse_quantization(fields: Fields) -> BlockQuantization | None:
    """The quantisation that a configuration's fields state, or None.

    Raises:
        ValueError: a method other than DeepSeek's block-scaled FP8.
    """
    quantization = fields.nested("quantization_config")
    if quantization is None:
        return None
    if quantization.take("quant_method") != "fp8":
        raise quantization.error("quant_method", "only 'fp8' is supported; convert the checkpoint to BF16 first")
    quantization.only("fmt", "e4m3", "weights of another format cannot be read")
    quantization.only("activation_scheme", "dynamic", "scales of activations are found as they come")
    quantization.only("expert_dtype", "fp8", "experts of another format cannot be read")
    block = quantization.take("weight_block_size")
    if block not in ([128, 128], (128, 128)):
        raise quantization.error("weight_block_size", "only blocks of [128, 128] are supported")
    scales = quantization.take("scale_fmt", "float")
    if scales not in ("float", "ue8m0"):
        raise quantization.error("scale_fmt", "only 'ue8m0' (powers of two) and 'float' are supported")
    quantization.finish(HARMLESS)
    return BlockQuantization(power_of_two_scales=scales == "ue8m0")


def read_quantization(config: Mapping[str, Any], source: str = "config.json") -> BlockQuantization | None:
    """The quantisation that ``config`` (a parsed ``config.json``) states, or None for plain weights.

    Raises:
        ValueError: a method other than DeepSeek's block-scaled FP8, naming ``source``, the field and its value.
    """
    return parse_quantization(Fields(config, source))


def write_quantization(quantization: BlockQuantization) -> dict[str, Any]:
    """The ``quantization_config`` object of the published checkpoints."""
    written: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.block_size),
    }
    return written | ({"scale_fmt": "ue8m0"} if quantization.power_of_two_scales else {})
