"""How a coefficient changes over a run, as pure functions of the step: the learning rate, and the bias update's speed.

A schedule is a factor on a peak value: a linear warm-up from near zero, a plateau at 1, then a decay to a floor.  V3's
own is warm-up, constant for two thirds, cosine to a tenth [V3 section 4.2]; ``decay_start`` says where the plateau
ends.  Steps count from 0, and the last one is ``num_steps - 1``.  Free of torch.
"""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def warmup(step: int, warmup_steps: int) -> float:
    """(step + 1) / warmup_steps until it reaches 1: no step is taken at zero."""
    return 1.0 if step >= warmup_steps else (step + 1) / warmup_steps


def decay(progress: float, kind: Decay, floor: float) -> float:
    """From 1 at ``progress`` 0 to ``floor`` at ``progress`` 1; outside, the nearer end."""
    progress = min(max(progress, 0.0), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def factor(
    step: int,
    num_steps: int,
    warmup_steps: int = 0,
    kind: Decay = "cosine",
    decay_start: float = 0.0,
    floor: float = 0.0,
) -> float:
    """The factor at ``step`` of ``num_steps``.

    Args:
        warmup_steps: steps of linear warm-up.
        kind: shape of the decay.
        decay_start: share of the run before the decay begins; never before the warm-up ends.
        floor: factor at the last step.
    """
    first = max(warmup_steps, round(decay_start * num_steps))
    last = num_steps - 1
    if step < first or last <= first:
        return warmup(step, warmup_steps)
    return warmup(step, warmup_steps) * decay((step - first) / (last - first), kind, floor)
