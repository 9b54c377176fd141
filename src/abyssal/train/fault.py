"""Why a step went wrong: the first layer whose numbers are not finite, or the parameter whose gradient exploded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from abyssal.data.batch import Batch
from abyssal.model.transformer import Transformer
from abyssal.train.bad_tiles import describe_bad_tiles
from abyssal.train.loss import hidden_states, packed_step


class TrainingFault(FloatingPointError):
    """A loss or a gradient that is not finite, or a gradient that exploded.  The parameters are as before the step.

    Attributes:
        step: from 0.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def describe_fault(model: Transformer, parts: Sequence[Batch], step: int, loss: float, norm: float) -> TrainingFault:
    """Look for the place, with the gradients of the failed step still there, not clipped.

    Args:
        parts: the micro-batches of the failed step.
        loss, norm: its loss and its gradient norm.
    """
    found = f"step {step}: the loss is {loss:.6g} with a gradient norm of {norm:.6g}; {_place(model, parts)}"
    return TrainingFault(step, f"{found}; {_REMEDY}")


def describe_bad_validation(model: Transformer, parts: Sequence[Batch], steps_done: int, loss: float) -> TrainingFault:
    """The same for held-out text after ``steps_done`` steps; ``parts``: batches of it."""
    found = f"after step {steps_done} the held-out loss is {loss:.6g}; {_place(model, parts)}"
    return TrainingFault(steps_done, f"{found}; {_REMEDY}")


_REMEDY = "lower lr, lengthen warmup_steps, or look at the data of this step"


def _place(model: Transformer, parts: Sequence[Batch]) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name} is not finite"
    for batch in parts:
        layer = _first_layer(model, batch)
        if layer is not None:
            place = f"the output of layer {layer} is the first that is not finite"
            tiles = describe_bad_tiles(model, batch)
            return place if tiles is None else f"{place}, and {tiles}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in reversed(gradients.items()):  # the backward comes from the end
        if not torch.isfinite(gradient).all():
            return f"the gradient of {name} is the first that is not finite"
    if not gradients:
        return "every layer's output is finite"
    name = max(gradients, key=lambda name: float(gradients[name].norm()))
    return f"the gradient of {name} is the largest, with a norm of {float(gradients[name].norm()):.6g}"


@torch.no_grad()
def _first_layer(model: Transformer, batch: Batch) -> int | None:
    found: list[int] = []

    def look(layer: int, output: Any) -> None:
        if not found and not torch.isfinite(output).all():
            found.append(layer)

    hooks = [
        block.register_forward_hook(lambda _, __, output, layer=block.layer: look(layer, output))
        for block in model.blocks()
    ]
    try:
        tokens_BX = torch.from_numpy(batch.tokens_BX).to(model.embed.weight.device)
        for _ in hidden_states(model, tokens_BX, packed_step(model, batch)):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
