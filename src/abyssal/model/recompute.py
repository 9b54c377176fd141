"""Activations that are forgotten after the forward and computed again in the backward [V3 section 3.2.3].

The outputs of RMSNorm, of MLA's up-projections and of SwiGLU are large and cheap: what made them is kept anyway.  Such
a tensor is read twice, by its consumer's forward and by its consumer's backward, so in between its memory is given
back: :meth:`Forgotten.forget` empties its storage once the consumers have run, and a hook on the block's output fills
it again, with the same bits, when the backward reaches the block.  The graph of autograd does not change and nothing
else runs twice (no router, so no expert is counted again); a block cut into stages works like a whole one.

One tensor comes back a little other than it was: the output of SwiGLU of which a recipe keeps the input in FP8, before
a product that is not in FP8.  It is made of what was kept (:mod:`abyssal.precision.swiglu`).

The trade-off not taken: checkpointing whole blocks, which saves more memory and repeats attention and experts too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from abyssal.kernels.fp8_tiles import Quantised
from abyssal.precision.operand import Activation, Operand, plain

Made = TypeVar("Made")


class Forgotten:
    """What the blocks of one pass have forgotten, by block."""

    def __init__(self) -> None:
        self._fills: dict[int, list[Callable[[], None]]] = {}
        self._shared: dict[int, list[_Shared]] = {}
        self._queries: dict[int, Callable[[], Tensor]] = {}

    def forget(self, layer: int, activation: Tensor, recompute: Callable[[], Tensor]) -> None:
        """Give back the memory of ``activation`` until the backward reaches block ``layer``.

        Args:
            activation: has its storage to itself; its consumers have run and nothing reads it before the backward.
            recompute: makes the same values again from tensors that are kept.

        Does nothing where no gradient will come.
        """
        if not torch.is_grad_enabled():
            return
        # .data has a version counter of its own: autograd must not take the filling for a change.
        storage, values = activation.untyped_storage(), activation.data
        num_bytes = storage.nbytes()
        assert num_bytes == values.numel() * values.element_size(), "a view has no storage of its own to give back"
        storage.resize_(0)

        def fill() -> None:
            with torch.enable_grad():  # the kernels of training again: those without gradients round otherwise
                made = recompute().detach()
            storage.resize_(num_bytes)
            values.copy_(made.view_as(values))

        self._fills.setdefault(layer, []).append(fill)

    def forget_activation(self, layer: int, activation: Activation, recompute: Callable[[], Activation]) -> None:
        """The same for what goes into products: of one that is quantised, the codes and scales that were kept."""
        if not isinstance(activation, Operand):
            self.forget(layer, activation, lambda: plain(recompute()))
            return
        kept, again = _kept(activation), self.shared(layer, lambda: _kept(recompute()))
        self.forget(layer, kept.codes, lambda: again().codes)
        self.forget(layer, kept.scales, lambda: again().scales)

    def shared(self, layer: int, make: Callable[[], Made]) -> Callable[[], Made]:
        """``make``, run once while block ``layer`` is recalled however often it is asked: for several activations that
        come from one computation."""
        found = _Shared(make)
        self._shared.setdefault(layer, []).append(found)
        return found

    def offer_query(self, layer: int, make: Callable[[], Tensor]) -> None:
        """Say how block ``layer`` makes its query: the stage that forgets it is not the one that made it."""
        self._queries[layer] = self.shared(layer, make)

    def query(self, layer: int) -> Callable[[], Tensor]:
        """What was offered."""
        return self._queries[layer]

    def recall_before(self, layer: int, output: Tensor) -> None:
        """Fill everything that block ``layer`` forgot when a gradient of its ``output`` arrives."""
        if layer in self._fills and output.requires_grad:
            output.register_hook(lambda _: self._recall(layer))

    def _recall(self, layer: int) -> None:
        for fill in self._fills.pop(layer, ()):
            fill()
        for shared in self._shared.pop(layer, ()):
            shared.clear()
        self._queries.pop(layer, None)


def _kept(activation: Activation) -> Quantised:
    assert isinstance(activation, Operand) and isinstance(activation.kept, Quantised)
    return activation.kept


class _Shared(Generic[Made]):
    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._made: Made | None = None

    def __call__(self) -> Made:
        if self._made is None:
            self._made = self._make()
        return self._made

    def clear(self) -> None:
        self._made = None
