"""How many tokens cross between nodes at once: found by trying, on the shapes that are dispatched.

Small chunks let the two hops overlap, and each costs a message to every peer.  Where the two balance depends on the
links, so a few sizes are tried with the first tokens that are many enough to be cut, and all ranks choose the one whose
slowest rank was fastest.  The choice changes no bits, so the first step may be measured and the rest run with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed

FEWEST_TOKENS = 64
"""Of a chunk: fewer are a message that costs more than it carries."""
CUTS = (1, 2, 4, 8)
TRIALS = 3
SLACK = 0.03
"""By how much a size with more chunks must be faster to be worth its messages."""


@dataclass(frozen=True)
class ChunkSize:
    """What was found."""

    tokens: int
    seconds: dict[int, float]
    """Of dispatch and combine for each size tried: of the best trial, on the slowest rank."""


def candidates(most_tokens: int) -> list[int]:
    """Sizes to try where no rank has more tokens, from whole to small."""
    sizes = {-(-most_tokens // cut) for cut in CUTS}
    return sorted({max(most_tokens, 1)} | {size for size in sizes if size >= FEWEST_TOKENS}, reverse=True)


def worth_measuring(most_tokens: int) -> bool:
    """Whether there is more than one size to try."""
    return len(candidates(most_tokens)) > 1


def measure(
    trial: Callable[[int], None], most_tokens: int, group: distributed.ProcessGroup, device: torch.device
) -> ChunkSize:
    """Run ``trial`` with each size on all ranks of ``group`` and choose together.

    Args:
        trial: dispatches and combines with chunks of so many tokens.
        most_tokens: of any rank.
    """
    sizes = candidates(most_tokens)
    seconds = torch.tensor([_best(lambda size=size: trial(size), device) for size in sizes], device=device)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX, group)
    return choose(dict(zip(sizes, seconds.tolist(), strict=True)))


def choose(seconds: dict[int, float]) -> ChunkSize:
    """The largest size that is as fast as the fastest, within the slack."""
    enough = min(seconds.values()) * (1 + SLACK)
    return ChunkSize(max(size for size, time_taken in seconds.items() if time_taken <= enough), seconds)


def _best(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of the best of several runs, after one that is not counted."""
    best = float("inf")
    for turn in range(TRIALS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if turn:
            best = min(best, time.perf_counter() - began)
    return best
