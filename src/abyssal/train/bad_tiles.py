"""How many quantised tiles of a pass hold an infinity or a NaN, and where the first of them are.

A tile with one comes back as NaN throughout (:mod:`abyssal.kernels.fp8_tiles`), so a step that it is in fails; this
looks for it afterwards, in a forward pass of its own, and costs a step that goes well nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.model.experts import Experts
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear
from abyssal.precision.operand import Activation, Operand, operand
from abyssal.precision.recipe import LinearEntry
from abyssal.train.loss import hidden_states, packed_step


@torch.no_grad()
def describe_bad_tiles(model: Transformer, batch: Batch) -> str | None:
    """The inputs of products in FP8 with bad tiles, counted, the first of them by name; None where there are none."""
    found: list[tuple[str, int]] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                stack.enter_context(_counting(found, name, module, "gate_up", module.gate_up_entry))
                stack.enter_context(_counting(found, name, module, "down", module.down_entry))
            elif isinstance(module, Linear):
                hook = module.register_forward_pre_hook(_hook(_looker(found, name, module.entry)))
                stack.callback(hook.remove)
        tokens_BX = torch.from_numpy(batch.tokens_BX).to(model.device)
        for _ in hidden_states(model, tokens_BX, packed_step(model, batch)):
            pass
    if not found:
        return None
    total = sum(number for _, number in found)
    tiles = "FP8 tile holds" if total == 1 else "FP8 tiles hold"
    return f"{total} {tiles} an infinity or a NaN, the first {found[0][1]} in the input of {found[0][0]}"


@contextmanager
def _counting(
    found: list[tuple[str, int]], name: str, experts: Experts, product: str, entry: LinearEntry
) -> Iterator[None]:
    """Count in what one of the experts' products is given: they are methods, on which there are no hooks."""
    run: Callable[..., Tensor] = getattr(experts, product)
    look = _looker(found, f"{name}.{product}", entry)

    def looking(rows: Activation, *arguments: Any) -> Tensor:
        look(rows)
        return run(rows, *arguments)

    setattr(experts, product, looking)
    try:
        yield
    finally:
        delattr(experts, product)


def _looker(found: list[tuple[str, int]], name: str, entry: LinearEntry) -> Callable[[Activation], None]:
    """Notes the bad tiles of an activation that goes into the product ``name``."""

    def look(activation: Activation) -> None:
        made = operand(activation, entry)
        if isinstance(made, Operand) and (number := made.codes.bad_tiles()):
            found.append((name, number))

    return look


def _hook(look: Callable[[Activation], None]) -> Callable[[Any, tuple[Any, ...]], None]:
    return lambda _, inputs: look(inputs[0])
