"""What one pass over a batch is given besides its tokens: context, dispatcher, rotation, and what it leaves behind.

Legend: T tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from abyssal.model.recompute import Forgotten
from abyssal.precision.linear import WeightQueue
from abyssal.spec.tile_format import TileFormat

if TYPE_CHECKING:
    from abyssal.model.context import AttentionContext
    from abyssal.model.dispatch import Dispatcher
    from abyssal.model.rope import Rotation
    from abyssal.model.router import Routing


class BalanceLoss(Protocol):
    """An auxiliary loss of one layer's routing, already scaled by its coefficient."""

    def __call__(self, layer: int, scores_TE: Tensor, expert_ids_TK: Tensor, context: AttentionContext) -> Tensor: ...


@dataclass
class Step:
    """One pass over a batch.  A step is used once; the model adds to its last three fields only."""

    context: AttentionContext
    dispatcher: Dispatcher
    rotation: Rotation
    wire: TileFormat | None = None
    """What tokens on their way to experts are quantised to, and their gradients on the way back; None: not at all."""
    queue: WeightQueue | None = None
    """Where weight gradients are put off to; None computes them in the backward."""
    balance: BalanceLoss | None = None
    forced_routing: Mapping[int, Tensor] | None = None
    """Expert ids (T, K) by layer that replace the router's choice; gate values still come from its scores."""
    routings: dict[int, Routing] = field(default_factory=dict)
    """Each MoE layer's routing, by layer (MTP modules count on after the last layer), detached."""
    balance_losses: dict[int, Tensor] = field(default_factory=dict)
    """The value of ``balance`` by layer, detached."""
    forgotten: Forgotten = field(default_factory=Forgotten)
    """Activations to be computed again in the backward."""
