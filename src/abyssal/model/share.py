"""Which experts of a model a rank holds, and which layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abyssal.model.part import ModelPart
from abyssal.spec.placement import Placement


@dataclass(frozen=True)
class ExpertShare:
    """The experts in the slots of one of a placement's ranks; without one, a model holds them all."""

    placements: Mapping[int, Placement]
    """By layer, MTP modules counted on after the last; all over the same number of ranks."""
    rank: int
    """Which of those ranks this is."""
    part: ModelPart | None = None
    """The layers of a pipeline rank; all by default."""
