"""What is watched of whoever runs the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from abyssal.engine.wire import Statistics
from abyssal.serve.service import State


class Watched(Protocol):
    """A service, as metrics and the board see it."""

    @property
    def state(self) -> State: ...

    @property
    def statistics(self) -> Statistics: ...

    @property
    def restarts(self) -> int:
        """How often the engine's process was started again."""
        ...

    @property
    def expert_layers(self) -> Sequence[int]:
        """Numbers of the layers with experts: the rows of :attr:`Statistics.expert_loads`."""
        ...
