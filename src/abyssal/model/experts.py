"""Feed-forward layers: SwiGLU, the stacked routed experts, and the mixture of both [V3 eq. 12].

Routed experts are *slots*: tensors stacked by local physical slot, filled from logical experts by a placement.  A hot
expert may have several slots, on this rank or another; :meth:`Experts.load_slots` changes what a slot holds while the
model lives.

Legend: D model, F expert hidden (gate and up together in ``w_gate_up_EFD``), E local slots, A rows sorted by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from abyssal.kernels.swiglu import swiglu
from abyssal.model.router import Router
from abyssal.model.step import Step
from abyssal.precision.linear import Linear, grouped_linear
from abyssal.precision.operand import Activation, operand
from abyssal.precision.recipe import LinearEntry, Product, Recipe
from abyssal.precision.swiglu import kept_swiglu
from abyssal.spec.model import ModelSpec
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat

_PRODUCTS: dict[str, tuple[Product, Product]] = {
    "dense": ("dense.gate_up", "dense.down"),
    "shared": ("shared.gate_up", "shared.down"),
}


class FFN(nn.Module):
    """SwiGLU feed-forward: a dense layer's, or the shared experts of a mixture as one."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        recipe: Recipe,
        kind: Literal["dense", "shared"],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        gate_up, down = (recipe.product(name) for name in _PRODUCTS[kind])
        self.forgets_swiglu = "swiglu" in recipe.recompute
        self.kept_swiglu = recipe.kept_swiglu if kind == "shared" else None
        self.gate_up = Linear(hidden_size, 2 * ffn_size, gate_up, device, dtype, parts=2)
        self.down = Linear(ffn_size, hidden_size, down, device, dtype)

    def forward(self, u_TD: Activation, layer: int, step: Step) -> Tensor:
        gate_up_TF = self.gate_up(u_TD, step.queue)
        h, again = _hidden(gate_up_TF, None, self.kept_swiglu, self.down.entry)
        out_TD = self.down(h, step.queue)
        if again is not None and (self.forgets_swiglu or self.kept_swiglu is not None):
            step.forgotten.forget_activation(layer, h, again)
        return out_TD


def _hidden(
    gate_up_TF: Tensor, weights_T: Tensor | None, kept: TileFormat | None, entry: LinearEntry
) -> tuple[Activation, Callable[[], Activation] | None]:
    """SwiGLU as the product of ``entry`` reads it, and what makes it again; None where it does that itself."""
    if kept is not None:
        return kept_swiglu(gate_up_TF, weights_T, kept, entry)

    def make() -> Activation:
        return operand(swiglu(gate_up_TF, weights_T), entry)

    return make(), make


class Experts(nn.Module):
    """The routed experts of one layer on this rank.

    Args:
        rank: which of the placement's ranks this is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        recipe: Recipe,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        assert spec.moe is not None
        hidden, width, slots = spec.hidden_size, spec.moe.expert_ffn_size, placement.slots_per_rank
        self.placement = placement
        self.rank = rank
        self.gate_up_entry = recipe.product("experts.gate_up")
        self.down_entry = recipe.product("experts.down")
        self.kept_swiglu = recipe.kept_swiglu
        self.forgets_swiglu = "swiglu" in recipe.recompute
        self.w_gate_up_EFD = nn.Parameter(torch.empty(slots, 2 * width, hidden, device=device, dtype=dtype))
        self.w_down_EDF = nn.Parameter(torch.empty(slots, hidden, width, device=device, dtype=dtype))

    @property
    def slots(self) -> tuple[int, ...]:
        """The logical expert of each local slot."""
        return self.placement.experts_of_rank(self.rank)

    def forward(self, rows_AD: Activation, weights_A: Tensor, counts: Sequence[int], layer: int, step: Step) -> Tensor:
        """Each row through its slot's expert, times its routing weight: (A, D)."""
        gate_up_AF = self.gate_up(rows_AD, counts, step)
        h, again = _hidden(gate_up_AF, weights_A, self.kept_swiglu, self.down_entry)
        out_AD = self.down(h, counts, step)
        if again is not None and (self.forgets_swiglu or self.kept_swiglu is not None):
            step.forgotten.forget_activation(layer, h, again)
        return out_AD

    def gate_up(self, rows_AD: Activation, counts: Sequence[int], step: Step) -> Tensor:
        """Each row times its slot's gate and up weights: (A, 2F)."""
        return grouped_linear(rows_AD, self.w_gate_up_EFD, counts, self.gate_up_entry, step.queue, parts=2)

    def down(self, rows_AF: Activation, counts: Sequence[int], step: Step) -> Tensor:
        """Each row times its slot's down weight: (A, D)."""
        return grouped_linear(rows_AF, self.w_down_EDF, counts, self.down_entry, step.queue)

    @torch.no_grad()
    def load_slots(self, placement: Placement, changes: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Adopt ``placement``, whose number of slots and ranks must be the present one.

        Args:
            placement: what the slots hold from now on.
            changes: for each local slot whose expert changes, its weights (2F, D) and (D, F).

        Raises:
            ValueError: another number of slots or experts, a changed slot without weights, or weights that do not fit
                their slot.  Nothing is changed then.
        """
        self.check_fits(placement)
        now = placement.experts_of_rank(self.rank)
        changed = {slot for slot, expert in enumerate(now) if expert != self.slots[slot]}
        if missing := sorted(changed - changes.keys()):
            raise ValueError(f"changes: slots {missing[:8]} hold another expert from now on; give their weights")
        for slot, (gate_up_FD, down_DF) in changes.items():
            shapes, fitting = (
                (gate_up_FD.shape, down_DF.shape),
                (self.w_gate_up_EFD.shape[1:], self.w_down_EDF.shape[1:]),
            )
            if slot not in range(len(self.slots)) or shapes != fitting:
                raise ValueError(
                    f"changes: weights of shapes {[tuple(shape) for shape in shapes]} for slot {slot} do not fit "
                    f"slots 0..{len(self.slots) - 1} of {[tuple(shape) for shape in fitting]}"
                )
        for slot, (gate_up_FD, down_DF) in changes.items():
            self.w_gate_up_EFD[slot].copy_(gate_up_FD)
            self.w_down_EDF[slot].copy_(down_DF)
        self.placement = placement

    def check_fits(self, placement: Placement) -> None:
        """Refuse a placement of another number of slots, ranks or experts than the present one."""
        if (placement.num_slots, placement.num_ranks) != (self.placement.num_slots, self.placement.num_ranks):
            raise ValueError(
                f"placement: {placement.num_slots} slots on {placement.num_ranks} ranks do not fit the "
                f"{self.placement.num_slots} on {self.placement.num_ranks} that this layer has"
            )
        _check_experts(placement, self.placement.num_experts)


def _check_experts(placement: Placement, num_experts: int) -> None:
    if placement.num_experts != num_experts:
        raise ValueError(f"placement: is of {placement.num_experts} experts, the layer has {num_experts}; make it anew")


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        placement: Placement | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        placement = placement or Placement.identity(moe.num_experts)
        _check_experts(placement, moe.num_experts)
        self.router = Router(spec.hidden_size, moe, recipe.product("gate"), device, dtype)
        self.experts = Experts(spec, placement, recipe, device, dtype, rank)
        shared_size = moe.num_shared_experts * moe.expert_ffn_size
        self.shared = FFN(spec.hidden_size, shared_size, recipe, "shared", device, dtype) if shared_size else None
