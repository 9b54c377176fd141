"""A plan of a dispatcher between ranks: what was asked, and the route that its thread finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from abyssal.model.dispatch import Handle


class _HasCounts(Protocol):
    @property
    def counts(self) -> Sequence[int]:
        """Rows of each local slot."""
        ...


Route = TypeVar("Route", bound=_HasCounts, covariant=True)


@dataclass(frozen=True)
class RoutedPlan(Generic[Route]):
    """Where each row of one layer's tokens goes."""

    layer: int
    slots_TK: Tensor
    """Physical slots."""
    route: Handle[Route]

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each local slot, when they are known."""
        return self.route.wait().counts
