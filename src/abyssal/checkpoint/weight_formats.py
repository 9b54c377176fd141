"""Which weights of an FP8 checkpoint are in FP8, and with what scales: as the model's own products read them.

A model with an FP8 recipe multiplies by the codes and scales of its weights [V3 section 3.3.2], so its checkpoint holds
those, and nothing is rounded once more; what the recipe keeps out of FP8 is in BF16.  A model of another recipe is
converted: every weight that published checkpoints quantise, with FP32 scales as DeepSeek-V3's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from abyssal.checkpoint.layout import Format
from abyssal.checkpoint.names import Piece
from abyssal.model.experts import Experts
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear
from abyssal.precision.recipe import LinearEntry
from abyssal.spec.hf_quantization import BlockQuantization

LEFT_OUT = "modules_to_not_convert"
"""Of ``quantization_config``: modules whose weights are plain, by their Hugging Face names."""


@dataclass(frozen=True)
class WeightFormats:
    """The formats of one FP8 checkpoint."""

    power_of_two: bool = False
    """Whether scales are powers of two."""
    left_out: tuple[str, ...] = ()
    """Hugging Face tensors that published checkpoints have in FP8 and this one has not."""

    @staticmethod
    def of(model: Transformer, pieces: Iterable[Piece]) -> WeightFormats:
        """Those of ``model``.

        Raises:
            ValueError: a recipe whose weights are no E4M3 by 128 x 128 blocks.
        """
        if model.recipe.fp8 is None:
            return WeightFormats()
        form = model.recipe.fp8.weight
        if (form.code, form.tile) != ("e4m3", "128x128"):
            raise ValueError(
                f"the recipe has weights in {form.code} with {form.tile} scales, and FP8 checkpoints hold e4m3 with "
                "128x128: save the model as bf16 or fp32"
            )
        plain = [
            piece.hf_name
            for piece in pieces
            if piece.storage == "block" and _entry(model, piece.parameter).fp8 is None and piece.copy_of is None
        ]
        return WeightFormats(form.scale == "ue8m0", tuple(plain))

    def form(self, piece: Piece) -> Format:
        """What ``piece`` is stored in."""
        return "bf16" if piece.hf_name in self.left_out else "fp8"

    def complete(self, config: dict[str, Any]) -> None:
        """Name what was left out in a written ``config.json``, for servers that cannot see it in the tensors."""
        if self.left_out:
            config["quantization_config"][LEFT_OUT] = [module_name(name) for name in self.left_out]

    def quantization(self) -> BlockQuantization:
        return BlockQuantization(power_of_two_scales=self.power_of_two)


def module_name(hf_name: str) -> str:
    """The module of a weight."""
    return hf_name.removesuffix(".weight")


def left_out_modules(config: Mapping[str, Any]) -> frozenset[str]:
    """The modules that a ``config.json`` says are not in FP8."""
    return frozenset((config.get("quantization_config") or {}).get(LEFT_OUT) or ())


def _entry(model: Transformer, parameter: str) -> LinearEntry:
    """The recipe's entry of the product that reads a parameter."""
    path, _, name = parameter.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, Experts):
        return owner.gate_up_entry if name == "w_gate_up_EFD" else owner.down_entry
    assert isinstance(owner, Linear), f"{parameter} is read by no matrix product"
    return owner.entry
