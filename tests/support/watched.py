"""A stand-in for who runs the engine, with statistics that tests set, and clocks that they turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from abyssal.engine.wire import Statistics
from abyssal.serve.service import State


@dataclass
class StandIn:
    """As metrics and the board see a service."""

    state: State = State.READY
    statistics: Statistics = field(default_factory=Statistics)
    restarts: int = 0
    expert_layers: Sequence[int] = ()

    def change(self, **values: object) -> None:
        self.statistics = msgspec.structs.replace(self.statistics, **values)


@dataclass
class Clock:
    """Seconds that only a test lets pass."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now
