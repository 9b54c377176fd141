"""ZeRO-1 (arXiv 1910.02054): FP32 masters, moments and average in parts, a data-parallel rank one part of each matrix.

The model's own parameters are in the dtype in which their products read them, BF16 most of them: to the bit what a
single rank's cast of its FP32 parameter gives, so that gathering half the bytes changes no number.  Norms, the gate,
and weights that are quantised to FP8 from their master, are gathered in FP32.  Gradients are FP32
(``Tensor.grad_dtype``).

During the last backward of a step each bucket of gradients sets out to its owners as soon as its last gradient is
there.  After the optimizer has moved the owned parts, every bucket's new values set out at once; a block waits for its
own when the next forward reaches it.  Buckets go in one order on all ranks.

An expert's master is at its home, wherever its slots are (:mod:`abyssal.parallel.homes`).

The trade-off not taken: FSDP, whose parameters too are in parts.  It gathers each of them twice a micro-batch, where a
pipeline of many micro-batches wants them to stay; V3 trains with ZeRO-1 [V3 section 3.2].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from abyssal.model.experts import Experts, MoE
from abyssal.model.transformer import Transformer
from abyssal.parallel.bucket import Bucket, grouped
from abyssal.parallel.holders import Sharing, trained_elsewhere
from abyssal.parallel.homes import Homes, homes
from abyssal.parallel.matrix import Matrix
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.stored import stored_dtypes
from abyssal.parallel.waiting import Waiting
from abyssal.spec.placement import Placement

BUCKET_ELEMENTS = 4 << 20
"""Small parameters travel together until they are so many: a message costs more than its bytes below."""


@dataclass(frozen=True)
class Owned:
    """This rank's rows of one matrix."""

    parameter: str
    whole_shape: tuple[int, ...]
    """Of the parameter, with all logical experts."""
    offsets: tuple[int, ...]
    tensor: Tensor
    """With as many axes as the whole."""


class ShardedMasters:
    """The masters of a model's trained parameters, this rank's part of each.

    Args:
        model: its parameters in FP32 (FP64 in FP64 runs); they are put into the dtype that is stored.
        movable: whether experts may be placed anew.  If not, an expert that has one owner is its own master.
        sharing: who holds what of a model in a pipeline.

    Attributes:
        tensors: masters by key; what the optimizer moves.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        waiting: Waiting,
        movable: bool = False,
        sharing: Sharing | None = None,
    ) -> None:
        self._model, self._mesh, self._waiting = model, mesh, waiting
        self.sharing = sharing or Sharing(mesh)
        self._homes = Homes(mesh.homes, waiting)
        buckets = _buckets(model, self.sharing)
        self._parts = [_Part(model, names, self.sharing, self._homes, waiting) for names in buckets]
        self.tensors: dict[str, Tensor] = {}
        for part in self._parts:
            self.tensors |= part.adopt(movable)
        self._missing = [0] * len(self._parts)
        self._next = -1
        self._hooks: list[Any] = []
        self._watch_gradients()
        self._watch_forwards()

    # ---- gradients ----

    def arm(self) -> None:
        """The backward that comes now is the step's last: gradients that are complete set out at once."""
        self._missing = [len(part.parameters) for part in self._parts]
        self._next = len(self._parts) - 1

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of the summed gradients, by key.  All ranks call it together."""
        if self._next < 0 and not any(part.launched for part in self._parts):
            self.arm()
        while self._next >= 0:
            self._launch()
        found: dict[str, Tensor] = {}
        for part in reversed(self._parts):
            found |= part.finish_reduce()
        return found

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The common norm of all ranks' parts."""
        parts = [gradient for gradient in gradients.values() if gradient.numel()]
        own = nn.utils.get_total_norm(parts) if parts else torch.zeros((), device=self._mesh.device)
        square = own.to(torch.float64).square()
        with self._waiting:
            distributed.all_reduce(square)
        return square.sqrt()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad()

    def _watch_gradients(self) -> None:
        for index, part in enumerate(self._parts):
            for parameter in part.parameters.values():
                hook = partial(self._has_gradient, index)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def _has_gradient(self, index: int, _: Tensor) -> None:
        if self._next < 0:
            return
        self._missing[index] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._launch()

    def _launch(self) -> None:
        self._parts[self._next].start_reduce()
        self._next -= 1

    # ---- new values ----

    def publish(self) -> None:
        """Send the masters' new values to every rank's model; returns before they are there."""
        self.wait()
        for part in self._parts:
            part.start_gather(self.tensors)

    def wait(self) -> None:
        """Until the model has all values that were published."""
        for part in self._parts:
            part.finish_gather()

    def _watch_forwards(self) -> None:
        """A module waits for its own parameters, the final norm for the head's too, when a forward reaches it."""
        model = self._model
        modules = {"embed": model.embed, "norm": model.norm}
        modules |= {f"layers.{number}": layer for number, layer in enumerate(model.layers)}
        modules |= {f"mtp.{number}": module for number, module in enumerate(model.mtp)}
        for name, module in modules.items():
            prefixes = (f"{name}.", "head.") if name == "norm" else (f"{name}.",)
            own = [part for part in self._parts if any(key.startswith(prefixes) for key in part.parameters)]
            self._hooks.append(module.register_forward_pre_hook(partial(_finish, own)))

    # ---- experts elsewhere ----

    def place(self, placements: Mapping[int, Placement]) -> None:
        """Let slots hold what ``placements`` says, by layer: nothing but values moves.  All ranks call it together.

        Raises:
            ValueError: a placement that does not fit its layer; nothing is changed then.
        """
        modules = {block.layer: block.ffn.experts for block in self._model.blocks() if isinstance(block.ffn, MoE)}
        for layer, placement in placements.items():
            modules[layer].check_fits(placement)
        self.wait()
        for layer, placement in placements.items():
            self._move_frozen(modules[layer], placement)
            modules[layer].placement = placement
        for part in self._parts:
            if part.experts:
                self.tensors |= part.part_from_model(self.tensors)
                part.start_gather(self.tensors)
        self.wait()

    @torch.no_grad()
    def _move_frozen(self, experts: Experts, placement: Placement) -> None:
        """Weights that have no master, under adapters, by way of their homes."""
        own = (parameter for parameter in experts.parameters(recurse=False) if not parameter.is_meta)
        frozen = [parameter.data for parameter in own if not parameter.requires_grad]
        for tensor in frozen:  # one at a time: the memory of the largest
            at_home = self._homes.to_homes([tensor], [experts.placement], first_only=True)
            self._homes.to_slots(at_home, [tensor], [placement])

    # ---- checkpoints ----

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every trained parameter, with all logical experts; those that other stages train, too."""
        shapes = {matrix.parameter: matrix.whole_shape for part in self._parts for matrix in part.bucket.matrices}
        for name in trained_elsewhere(self._model):
            owner, shape = _owner(self._model, name), tuple(self._model.get_parameter(name).shape)
            shapes[name] = (owner.placement.num_experts, *shape[1:]) if isinstance(owner, Experts) else shape
        return shapes

    def owned(self, values: Mapping[str, Tensor]) -> Iterator[Owned]:
        """Masters, or what is kept beside each under the same key, as rectangles of the whole parameters."""
        for part in self._parts:
            yield from part.owned(values)

    def close(self) -> None:
        """Leave the model without hooks."""
        self.wait()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _finish(parts: Sequence[_Part], *_: object) -> None:
    for part in parts:
        part.finish_gather()


def _buckets(model: Transformer, sharing: Sharing) -> list[list[str]]:
    """Names of the parameters that travel together, in the order of the forward: those of one kind, dtype and group."""
    stored, kinds = stored_dtypes(model), dict[tuple[bool, torch.dtype, str], list[str]]()
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            is_expert = isinstance(_owner(model, name), Experts)
            kinds.setdefault((is_expert, stored[name], str(sharing.key(name))), []).append(name)
    found = []
    for names in kinds.values():
        sizes = [model.get_parameter(name).numel() for name in names]
        found += [[names[index] for index in run] for run in grouped(sizes, BUCKET_ELEMENTS)]
    return sorted(found, key=lambda names: order[names[0]])


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


class _Part:
    """A bucket with the parameters that it serves."""

    def __init__(
        self, model: Transformer, names: Sequence[str], sharing: Sharing, homes_: Homes, waiting: Waiting
    ) -> None:
        self.parameters = {name: model.get_parameter(name) for name in names}
        owners = [_owner(model, name) for name in names]
        self.experts = [owner for owner in owners if isinstance(owner, Experts)]
        self._homes, self.launched, self._is_model = homes_, False, False
        first = next(iter(self.parameters.values()))
        group = sharing.group(names[0], bool(self.experts))
        stored = stored_dtypes(model)[names[0]]
        self.bucket = Bucket(list(self._matrices()), group, first.dtype, stored, first.device, waiting)

    def _matrices(self) -> Iterator[Matrix]:
        for index, (name, parameter) in enumerate(self.parameters.items()):
            if not self.experts:
                yield Matrix(name, tuple(parameter.shape))
                continue
            placement = self.experts[index].placement
            for expert in homes(placement.num_experts, self._homes.rank, self._homes.num_ranks):
                yield Matrix(name, tuple(parameter.shape[1:]), expert, placement.num_experts)

    @property
    def _placements(self) -> list[Placement]:
        return [experts.placement for experts in self.experts]

    @property
    def _at_home(self) -> bool:
        """Whether every slot is its expert's home."""
        return all(placement.is_identity for placement in self._placements)

    @torch.no_grad()
    def adopt(self, movable: bool) -> dict[str, Tensor]:
        """The masters from the parameters, which are put into their stored dtype."""
        bucket, parameters = self.bucket, list(self.parameters.values())
        alone = bucket.num_ranks == 1 and bucket.stored == bucket.wide and self._at_home
        self._is_model = alone and not (movable and self.experts)
        values = self._by_matrix([parameter.data for parameter in parameters], first_only=True)
        masters = {}
        for index, (matrix, value) in enumerate(zip(bucket.matrices, values, strict=True)):
            rows = value[slice(*bucket.own_rows(index))]
            masters[matrix.key] = rows if self._is_model else rows.clone(memory_format=torch.contiguous_format)
        for parameter in parameters:
            if parameter.dtype != bucket.stored:
                parameter.data = parameter.data.to(bucket.stored)
            parameter.grad_dtype = bucket.wide
        return masters

    def part_from_model(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masters of their own where the model's parameters were the masters."""
        if not self._is_model:
            return {}
        self._is_model = False
        return {matrix.key: masters[matrix.key].clone() for matrix in self.bucket.matrices}

    def _by_matrix(self, tensors: Sequence[Tensor], first_only: bool = False) -> list[Tensor]:
        """A tensor for each parameter, of this rank's slots, as one for each matrix."""
        if not self.experts:
            return list(tensors)
        stacked = tensors if self._at_home else self._homes.to_homes(tensors, self._placements, first_only)
        return [matrix for tensor in stacked for matrix in tensor]

    def start_reduce(self) -> None:
        self.launched = True
        parameters = list(self.parameters.values())
        if not self.experts:
            self.bucket.start_reduce([parameter.grad for parameter in parameters])
        else:
            wide = self.bucket.wide
            stacked = [torch.zeros_like(p, dtype=wide) if p.grad is None else p.grad for p in parameters]
            self.bucket.start_reduce(self._by_matrix(stacked))
        if self.bucket.num_ranks > 1 or not self._at_home:  # copied
            self.zero_grad()

    def finish_reduce(self) -> dict[str, Tensor]:
        self.launched = False
        return self.bucket.finish_reduce()

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def start_gather(self, masters: Mapping[str, Tensor]) -> None:
        if not self._is_model:
            self.bucket.start_gather(masters)

    @torch.no_grad()
    def finish_gather(self) -> None:
        if not self.bucket.gathering:
            return
        parameters = [parameter.data for parameter in self.parameters.values()]
        if self._at_home:
            self.bucket.finish_gather(self._by_matrix(parameters))
            return
        here = self._homes.rank, self._homes.num_ranks
        at_home = [
            tensor.new_empty(len(homes(placement.num_experts, *here)), *tensor.shape[1:])
            for tensor, placement in zip(parameters, self._placements, strict=True)
        ]
        self.bucket.finish_gather([matrix for tensor in at_home for matrix in tensor])
        self._homes.to_slots(at_home, parameters, self._placements)

    def owned(self, values: Mapping[str, Tensor]) -> Iterator[Owned]:
        for index, matrix in enumerate(self.bucket.matrices):
            first, end = self.bucket.own_rows(index)
            if end > first:
                value = values[matrix.key] if matrix.expert is None else values[matrix.key].unsqueeze(0)
                yield Owned(matrix.parameter, matrix.whole_shape, matrix.offsets(first), value)
