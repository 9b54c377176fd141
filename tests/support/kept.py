"""What a block really keeps between forward and backward: every storage that is alive because of the graph."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from abyssal.model.block import Block
from abyssal.model.step import Step


def kept_storages(block: Block, x_TD: Tensor, step: Step) -> dict[int, tuple[int, tuple[int, ...], torch.dtype]]:
    """Bytes, shape and dtype by address: what autograd saved, and what else came to life and stayed.

    Parameters and ``x_TD``'s own gradient do not count; the output does only if the backward needs it.
    """
    before = _living()
    saved: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = block(x_TD, step)
    gc.collect()
    for tensor in tensors:
        _add(saved, tensor)
    output = y_TD.untyped_storage().data_ptr()
    for address, found in _living().items():
        if address not in before and address != output:
            saved.setdefault(address, found)
    for parameter in block.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return {address: found for address, found in saved.items() if found[0]}


def _living() -> dict[int, tuple[int, tuple[int, ...], torch.dtype]]:
    found: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter):
            _add(found, candidate)
    return found


def _add(found: dict[int, Any], tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        found[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape), tensor.dtype)
