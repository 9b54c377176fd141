"""In which dtype a rank keeps each of the model's parameters, when their masters are elsewhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from abyssal.model.experts import Experts
from abyssal.model.lora import AdaptedExperts, AdaptedLinear
from abyssal.model.transformer import ACTIVATION_DTYPES, Embedding, Transformer
from abyssal.precision.linear import Linear
from abyssal.precision.recipe import LinearEntry


def stored_dtypes(model: Transformer) -> dict[str, torch.dtype]:
    """By name: BF16 where the recipe's activations are and nothing reads more of the parameter than that, its own dtype
    where something does: norms, the gate, weights that are quantised to FP8."""
    narrow = ACTIVATION_DTYPES.get(model.recipe.activations)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if narrow is None:
        return dtypes
    for module_name, module in model.named_modules():
        for name, entry in _entries(model, module).items():
            full_name = f"{module_name}.{name}"
            if full_name in dtypes and entry.fp8 is None and entry.operands == "activation":
                dtypes[full_name] = narrow
    return dtypes


def _entries(model: Transformer, module: nn.Module) -> dict[str, LinearEntry]:
    """The entry of the product that reads each of a module's own parameters."""
    if isinstance(module, Experts):
        entries = {"w_gate_up_EFD": module.gate_up_entry, "w_down_EDF": module.down_entry}
        if isinstance(module, AdaptedExperts):
            for weight, prefix in module.weights.items():
                for factor in _FACTORS:
                    entries[f"{prefix}{factor}"] = entries[weight].plain
        return entries
    if isinstance(module, Linear):
        adapters = {factor: module.entry.plain for factor in _FACTORS} if isinstance(module, AdaptedLinear) else {}
        return {"weight": module.entry, **adapters}
    if isinstance(module, Embedding):
        # Looked up, a row is cast to the activations' dtype; tied, it is the head's weight as well.
        return {"weight": LinearEntry() if model.head is not None else model.recipe.product("head")}
    return {}


_FACTORS: tuple[Literal["lora_a", "lora_b"], ...] = ("lora_a", "lora_b")
