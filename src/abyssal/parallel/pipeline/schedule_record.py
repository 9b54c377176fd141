"""What a pipeline schedule is: for each rank a list of actions, run in that order; records free of torch.

A model is cut into *stages*, 0 first.  A rank holds one or two of them as its *chunks*, and a micro-batch passes every
stage once forward and once backward.  Forward of a stage needs the forward of the stage before it, backward that of the
stage after it; whatever else a rank does is order alone, so a schedule says nothing of messages or times: what must be
sent, and what must be waited for, follows from the works (:meth:`Schedule.needs`).

Executor, simulator, pictures and tests read this one record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its part that gives the gradient of the input; its part that gives those of the weights."""
Part = Literal["F", "I", "W"]
"""What can be done of a stage for a micro-batch: ``B`` does ``I`` and ``W`` at once."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one chunk does for one micro-batch."""

    kind: Kind
    chunk: int
    """Which of the rank's chunks does it, from 0."""
    stage: int
    """Place of the chunk in the model, from 0."""
    micro_batch: int

    @property
    def sends_gradient(self) -> bool:
        """It makes the gradient of the stage's input, as ``B`` and ``I`` do."""
        return self.kind in ("B", "I")

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage} for micro-batch {self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Action:
    """One work; or a forward and a whole backward, of different micro-batches, whose stages are interleaved."""

    works: tuple[Work, ...]

    @property
    def is_pair(self) -> bool:
        return len(self.works) == 2

    def __str__(self) -> str:
        return " with ".join(map(str, self.works))


@dataclass(frozen=True)
class Schedule:
    """Actions of all ranks; ``schedule_check.check`` says whether they are complete and end."""

    name: str
    num_ranks: int
    num_micro_batches: int
    num_stages: int
    chunks: tuple[tuple[int, ...], ...]
    """By rank, the stage of each of its chunks.  A stage is on two ranks where micro-batches come from both ends."""
    actions: tuple[tuple[Action, ...], ...]
    """By rank, in the order in which it runs them."""

    def route(self, micro_batch: int) -> tuple[int, ...]:
        """By stage, the rank that runs ``micro_batch`` through it, forward and backward.

        Raises:
            ValueError: the schedule does not take that micro-batch through every stage.
        """
        ranks = [self._rank_of_forward.get((stage, micro_batch)) for stage in range(self.num_stages)]
        if None in ranks:
            raise ValueError(
                f"schedule {self.name} has no forward of stage {ranks.index(None)} for micro-batch {micro_batch} of "
                f"{self.num_micro_batches}"
            )
        return tuple(rank for rank in ranks if rank is not None)

    @cached_property
    def _rank_of_forward(self) -> dict[tuple[int, int], int]:
        return {(work.stage, work.micro_batch): rank for rank, work in self.works() if work.kind == "F"}

    def works(self) -> Iterator[tuple[int, Work]]:
        """Every work with its rank: rank by rank, each in its order."""
        for rank, actions in enumerate(self.actions):
            for action in actions:
                for work in action.works:
                    yield rank, work

    def needs(self, work: Work) -> list[tuple[Part, int]]:
        """What must be done for the work's micro-batch before it: what, and at which stage.

        ``("F", s)`` is the forward of stage ``s``; ``("I", s)`` the gradient of its input, by ``B`` or by ``I``.
        """
        stage = work.stage
        if work.kind == "F":
            return [("F", stage - 1)] if stage else []
        if work.kind == "W":
            return [("I", stage)]
        after: list[tuple[Part, int]] = [("I", stage + 1)] if stage < self.num_stages - 1 else []
        return [("F", stage), *after]
