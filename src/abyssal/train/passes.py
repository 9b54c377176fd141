"""Forward and backward of a step's micro-batches on this rank, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abyssal.data.batch import Batch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.step import BalanceLoss
from abyssal.model.transformer import Transformer
from abyssal.train.balance import Loads, add_loads
from abyssal.train.loss import training_loss


@dataclass(frozen=True)
class Given:
    """What all micro-batches of a step have in common."""

    parts: Sequence[Batch]
    counts: Sequence[int]
    """Learned targets of the global batch, of the main model and of each MTP depth."""
    mtp_weight: float
    balance: BalanceLoss | None
    dispatcher: Dispatcher | None


@dataclass
class Sums:
    """Of the micro-batches that were run here."""

    losses: list[float]
    """Of the main model and of each MTP depth, as shares of the global batch's means."""
    balance_loss: float = 0.0
    loads: Loads = field(default_factory=Loads)


def run_passes(model: Transformer, given: Given, before_last: Callable[[], None]) -> Sums:
    """One micro-batch after the other through the whole model.

    Args:
        before_last: called before the last backward.
    """
    sums = Sums([0.0] * (len(model.mtp) + 1))
    for number, part in enumerate(given.parts):
        found = training_loss(model, part, given.mtp_weight, given.balance, given.counts, given.dispatcher)
        if number == len(given.parts) - 1:
            before_last()
        found.total.backward()
        add_loads(sums.loads, found.step.routings)
        sums.losses = [sum_ + loss for sum_, loss in zip(sums.losses, found.parts, strict=True)]
        sums.balance_loss += sum(float(loss) for loss in found.step.balance_losses.values())
    return sums
