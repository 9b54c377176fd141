"""How many quantised tiles of a pass hold an infinity or a NaN, and where the first of them are.

A tile with one comes back as NaN throughout (:mod:`abyssal.kernels.fp8_tiles`), so a step that it is in fails; this
looks for it afterwards, in a forward pass of its own, and costs a step that goes well nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from abyssal.data.batch import Batch
from abyssal.model.experts import Experts
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear
from abyssal.precision.operand import Operand, operand
from abyssal.precision.recipe import LinearEntry
from abyssal.train.loss import hidden_states, packed_step


@torch.no_grad()
def describe_bad_tiles(model: Transformer, batch: Batch) -> str | None:
    """The inputs of products in FP8 with bad tiles, counted, the first of them by name; None where there are none."""
    found: list[tuple[str, int]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, place=(name, entry): _count(found, place, arguments[0]))
        for name, module in model.named_modules()
        if (entry := _entry(module)) is not None and entry.fp8 is not None
    ]
    try:
        tokens_BX = torch.from_numpy(batch.tokens_BX).to(model.embed.weight.device)
        for _ in hidden_states(model, tokens_BX, packed_step(model, batch)):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    total = sum(number for _, number in found)
    tiles = "FP8 tile holds" if total == 1 else "FP8 tiles hold"
    return f"{total} {tiles} an infinity or a NaN, the first {found[0][1]} in the input of {found[0][0]}"


def _entry(module: nn.Module) -> LinearEntry | None:
    if isinstance(module, Experts):
        return module.gate_up_entry
    return module.entry if isinstance(module, Linear) else None


def _count(found: list[tuple[str, int]], place: tuple[str, LinearEntry], activation: Any) -> None:
    name, entry = place
    made = operand(activation, entry)
    assert isinstance(made, Operand)
    if number := made.codes.bad_tiles():
        found.append((name, number))
