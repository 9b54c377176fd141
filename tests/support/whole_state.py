"""The state of a trainer on one rank, whose tensors are whole."""

from __future__ import annotations

from torch import Tensor

from abyssal.train.step import Trainer


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Its live tensors by name."""
    found = trainer.tensors()
    whole = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    assert whole.keys() == found.keys(), "a trainer on one rank holds every tensor whole"
    return whole
