"""What the page's board is told: a snapshot with history, and then a sample a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from abyssal.engine.wire import Statistics
from abyssal.serve.observe.figures import Figures
from abyssal.serve.observe.history import INTERVAL, History
from abyssal.serve.observe.totals import EngineTotals
from abyssal.serve.observe.watched import Watched

EXPERTS_EVERY = 5
"""Samples between two messages with expert loads: they are most of a message, and a slow mean."""


class Board:
    """Of one server.

    Args:
        model: as it is served.
        currency: of prices; None where every price is 0.
        ticks: seconds that never run backwards.
    """

    def __init__(
        self,
        model: str,
        service: Watched,
        totals: EngineTotals,
        figures: Figures,
        currency: str | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._service = service
        self._totals = totals
        self._figures = figures
        self._currency = currency
        self._ticks = ticks
        self._began = ticks()
        self._history = History(figures, clock, ticks)
        self.taken = 0
        """Samples so far."""
        self.tick()

    def tick(self) -> None:
        """Take a sample; once every :data:`~abyssal.serve.observe.history.INTERVAL`."""
        self._history.take(self._totals.update(self._service.statistics))
        self.taken += 1

    def sample(self) -> dict[str, Any]:
        """How it stands, by the newest sample."""
        now = self._totals.current
        body: dict[str, Any] = {
            "model": self._model,
            "state": self._service.state.value,
            "restarts": self._service.restarts,
            "uptime": round(self._ticks() - self._began, 1),
            "now": asdict(self._history.samples[-1]),
            "totals": self._sums(now),
            "drafts": [asdict(drafts) for drafts in self._history.drafts()],
            "saved": {
                "nano": self._figures.saved,
                "currency": self._currency or "",
                "priced": self._currency is not None,
            },
        }
        if self.taken % EXPERTS_EVERY == 1:
            body["experts"] = self._experts(now)
        return body

    def snapshot(self) -> dict[str, Any]:
        """All of it, for whoever comes."""
        experts = self._experts(self._totals.current)
        return {**self.sample(), "interval": INTERVAL, "experts": experts, "history": self._history.columns()}

    def _sums(self, now: Statistics) -> dict[str, Any]:
        names = ("prompt_tokens", "memory_hit_tokens", "disk_hit_tokens", "output_tokens", "preemptions", "disk_bytes")
        return {name: getattr(now, name) for name in names} | {"requests": self._figures.answered}

    def _experts(self, now: Statistics) -> dict[str, Any]:
        """Loads over the even share."""
        loads = [[round(share * len(row), 2) for share in row] for row in now.expert_loads]
        return {"layers": _layer_numbers(self._service.expert_layers, len(loads)), "loads": loads}


def _layer_numbers(layers: Sequence[int], count: int) -> list[int]:
    """One a row; counted from 0 where the engine has not said them."""
    return list(layers) if len(layers) == count else list(range(count))
