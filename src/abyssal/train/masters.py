"""What the optimizer moves: the parameters themselves on one rank, this rank's part of their masters on many.

Both answer the same calls, so that a step reads alike: gradients by key, their common norm, and new values published
to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.model.experts import Experts
from abyssal.model.transformer import Transformer
from abyssal.parallel.holders import Sharing, trained_elsewhere
from abyssal.parallel.zero import ShardedMasters


class Masters(Protocol):
    """The masters of a model's trained parameters."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By key, in FP32 at least; the live ones."""
        ...

    def arm(self) -> None:
        """The backward that comes now is the step's last."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Of the whole global batch, by key; a key without a gradient is absent."""
        ...

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of all parameters' gradients together."""
        ...

    def publish(self) -> None:
        """Give the model the masters' new values; they are there when :meth:`wait` returns."""
        ...

    def wait(self) -> None: ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...


class WholeMasters:
    """The parameters are the masters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    def arm(self) -> None:
        """Nobody waits for a gradient."""

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return nn.utils.get_total_norm(list(gradients.values()))

    def publish(self) -> None:
        """The model has them."""

    def wait(self) -> None:
        """The model has them."""

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def as_saved(masters: Masters, values: Mapping[str, Tensor]) -> dict[str, Tensor | Sharded]:
    """Masters, or what is kept beside them under the same keys, by parameter as a checkpoint has them."""
    if not isinstance(masters, ShardedMasters):
        return dict(values)
    dtype = next(iter(values.values())).dtype
    found = {name: Sharded(shape, dtype) for name, shape in masters.whole_shapes().items()}
    for owned in masters.owned(values):
        shards = (*found[owned.parameter].shards, Shard(owned.offsets, owned.tensor))
        found[owned.parameter] = Sharded(owned.whole_shape, dtype, shards)
    return dict(found)


def untrained(model: Transformer) -> dict[str, Tensor]:
    """What of a model no optimizer moves, by name: frozen parameters and buffers."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= trained_elsewhere(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in trained}


def untrained_parts(model: Transformer, sharing: Sharing, saving: bool) -> dict[str, Tensor | Sharded]:
    """The same on many ranks: to be loaded, all that this rank has; to be saved, each part by one of its holders."""
    found: dict[str, Tensor | Sharded] = {}
    for name, tensor in untrained(model).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, Experts):
            is_ours = not tensor.is_meta and (not saving or (sharing.is_first(name) and sharing.place.expert == 0))
            found[name] = tensor if is_ours else Sharded(tuple(tensor.shape), tensor.dtype)
            continue
        table = owner.placement.replica_table()
        first = owner.rank * owner.placement.slots_per_rank
        shards = [
            Shard((expert, *(0 for _ in tensor.shape[1:])), tensor[slot : slot + 1])
            for slot, expert in enumerate(owner.slots)
            if not tensor.is_meta and (not saving or (sharing.is_first(name) and table[expert][0] == first + slot))
        ]
        found[name] = Sharded((owner.placement.num_experts, *tensor.shape[1:]), tensor.dtype, tuple(shards))
    return found
