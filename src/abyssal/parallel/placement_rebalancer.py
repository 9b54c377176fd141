"""When experts are placed anew while a model trains: loads are added up step by step, and looked at every so many.

Every rank keeps one and is given the same global loads, so all reach the same placements without a word.  What is
added up is the state of a run and goes into its checkpoints; a run that goes on elsewhere decides as it would have.

Loads count from the last look on: what the router did before that is of no use for what it will do next, and the mean
of many steps is smoother than one step's loads.  Predicting the next ones is not attempted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.parallel.placement import balanced_placement
from abyssal.spec.placement import Placement


class Rebalancer:
    """Asked by the trainer after each step.

    Args:
        every: steps between looks; 0 never looks.
        redundant: slots of a layer beyond one an expert.
        num_ranks: among which one copy of the experts is spread.
        num_nodes: that those ranks are on.
        num_groups: of the router's experts.
        tolerance: see :func:`~abyssal.parallel.placement.balanced_placement`.

    Raises:
        ValueError: a number below 0.
    """

    def __init__(
        self,
        every: int,
        redundant: int,
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
        tolerance: float = 0.05,
    ) -> None:
        for name, number in (("every", every), ("redundant", redundant), ("tolerance", tolerance)):
            if number < 0:
                raise ValueError(f"{name} is {number}; give 0 or more")
        self.every = every
        self.redundant = redundant
        self.num_ranks = num_ranks
        self.num_nodes = num_nodes
        self.num_groups = num_groups
        self.tolerance = tolerance
        self._loads: dict[int, NDArray[np.int64]] = {}

    def add(self, loads: Mapping[int, Sequence[int]]) -> None:
        """Count a step's tokens of each logical expert, by layer, of the whole global batch."""
        for layer, counts in loads.items():
            counted = np.asarray(counts, np.int64)
            self._loads[layer] = self._loads[layer] + counted if layer in self._loads else counted

    def due(self, step: int) -> bool:
        """Whether placements are looked at when ``step`` steps are done."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def placements(self, current: Mapping[int, Placement]) -> dict[int, Placement] | None:
        """The layers whose placement changes, and their new ones; None where all are balanced enough.

        What was added up is forgotten.
        """
        layers = sorted(set(current) & set(self._loads))
        loads, self._loads = self._loads, {}
        if not layers:
            return None
        in_force = [current[layer] for layer in layers]
        found = balanced_placement(
            np.stack([loads[layer] for layer in layers]),
            in_force[0].num_experts + self.redundant,
            self.num_ranks,
            self.num_nodes,
            self.num_groups,
            in_force,
            tolerance=self.tolerance,
        )
        changed = {layer: new for layer, new, old in zip(layers, found, in_force, strict=True) if new != old}
        return changed or None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"loads": {str(layer): counts.tolist() for layer, counts in sorted(self._loads.items())}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._loads = {int(layer): np.asarray(counts, np.int64) for layer, counts in state["loads"].items()}
