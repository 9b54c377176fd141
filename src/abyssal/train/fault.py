"""Why a step went wrong: the first layer whose numbers are not finite, or the parameter whose gradient exploded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.transformer import Transformer
from abyssal.train.bad_tiles import describe_bad_tiles
from abyssal.train.loss import hidden_states, packed_step
from abyssal.train.ranks import SingleRank


class TrainingFault(FloatingPointError):
    """A loss or a gradient that is not finite, or a gradient that exploded.  The parameters are as before the step.

    Attributes:
        step: from 0.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def describe_fault(
    model: Transformer,
    parts: Sequence[Batch],
    step: int,
    loss: float,
    norm: float,
    gradients: Mapping[str, Tensor],
    dispatcher: Dispatcher | None = None,
    ranks: SingleRank | None = None,
    whole: bool = True,
) -> TrainingFault:
    """Look for the place, with the gradients of the failed step, not clipped.  All ranks call it together.

    Args:
        parts: the micro-batches of the failed step.
        loss, norm: its loss and its gradient norm.
        gradients: by name, this rank's part of each.
        whole: whether the model has all its layers; if not, outputs are not looked at.
    """
    place = _place(model, parts if whole else (), gradients, dispatcher, ranks or SingleRank())
    return TrainingFault(
        step, f"step {step}: the loss is {loss:.6g} with a gradient norm of {norm:.6g}; {place}; {_REMEDY}"
    )


def describe_bad_validation(
    model: Transformer,
    parts: Sequence[Batch],
    steps_done: int,
    loss: float,
    dispatcher: Dispatcher | None = None,
    ranks: SingleRank | None = None,
    whole: bool = True,
) -> TrainingFault:
    """The same for held-out text after ``steps_done`` steps; ``parts``: batches of it."""
    place = _place(model, parts if whole else (), {}, dispatcher, ranks or SingleRank())
    return TrainingFault(steps_done, f"after step {steps_done} the held-out loss is {loss:.6g}; {place}; {_REMEDY}")


_REMEDY = "lower lr, lengthen warmup_steps, or look at the data of this step"


@dataclass(frozen=True)
class _Finding:
    """What one rank found; of several ranks' the one of the lowest order is told."""

    order: int
    """0 a parameter, 1 a layer's output, 2 a gradient, 3 the largest gradient, 4 nothing."""
    size: float
    text: str


def _place(
    model: Transformer,
    parts: Sequence[Batch],
    gradients: Mapping[str, Tensor],
    dispatcher: Dispatcher | None,
    ranks: SingleRank,
) -> str:
    finding = _find(model, parts, gradients, dispatcher, ranks.num_ranks > 1)
    told = [_Finding(**json.loads(text)) for text in ranks.texts(json.dumps(asdict(finding)))]
    worst = min(range(len(told)), key=lambda rank: (told[rank].order, -told[rank].size))
    return told[worst].text if len(told) == 1 else f"on rank {worst} {told[worst].text}"


def _find(
    model: Transformer,
    parts: Sequence[Batch],
    gradients: Mapping[str, Tensor],
    dispatcher: Dispatcher | None,
    on_many_ranks: bool,
) -> _Finding:
    # On many ranks every rank runs every part, whatever it finds: the others wait for it at the experts.
    layers = [_first_layer(model, batch, dispatcher) for batch in parts] if on_many_ranks else None
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            return _Finding(0, 0.0, f"the parameter {name} is not finite")
    for number, batch in enumerate(parts):
        layer = _first_layer(model, batch, dispatcher) if layers is None else layers[number]
        if layer is not None:
            place = f"the output of layer {layer} is the first that is not finite"
            tiles = None if on_many_ranks else describe_bad_tiles(model, batch)
            return _Finding(1, -layer, place if tiles is None else f"{place}, and {tiles}")
    for name, gradient in reversed(list(gradients.items())):  # the backward comes from the end
        if not torch.isfinite(gradient).all():
            return _Finding(2, 0.0, f"the gradient of {name} is the first that is not finite")
    if not gradients:
        return _Finding(4, 0.0, "every layer's output is finite")
    name = max(gradients, key=lambda name: float(gradients[name].norm()))
    size = float(gradients[name].norm())
    return _Finding(3, size, f"the gradient of {name} is the largest, with a norm of {size:.6g}")


@torch.no_grad()
def _first_layer(model: Transformer, batch: Batch, dispatcher: Dispatcher | None) -> int | None:
    found: list[int] = []

    def look(layer: int, output: Any) -> None:
        if not found and not torch.isfinite(output).all():
            found.append(layer)

    hooks = [
        block.register_forward_hook(lambda _, __, output, layer=block.layer: look(layer, output))
        for block in model.blocks()
    ]
    try:
        tokens_BX = torch.from_numpy(batch.tokens_BX).to(model.device)
        for _ in hidden_states(model, tokens_BX, packed_step(model, batch, dispatcher=dispatcher)):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
