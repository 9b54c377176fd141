"""One micro-batch's pass through a chunk, stage by stage: what an interleaving moves on, and what runs alone in a row.

A pass goes through its blocks' stages forward and then, turned, backward; it keeps the record that one stage hands to
the next and the handle of what is under way.  Its ends (embedding, head) run with the stage that they stand beside.

Legend: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from abyssal.model.block import Block
from abyssal.model.dispatch import Handle
from abyssal.model.stages import STAGES, Arrivals, Gradients, StageIO, StageName, StageRun, joined
from abyssal.model.step import Step
from abyssal.parallel.pipeline.chunk_ends import EmbeddingRun, HeadRun
from abyssal.parallel.pipeline.interleaving import BACKWARD_ROW, FORWARD_ROW, Move, Side


class ChunkPass:
    """Of one micro-batch.

    Args:
        blocks: in the order of the forward.
        x_TD: the first block's input; None where an embedding stands before it.

    Attributes:
        before: the embedding.
        behind: by place of a block, the head that stands behind it.
    """

    def __init__(self, blocks: Sequence[Block], step: Step, x_TD: Tensor | None) -> None:
        self.before: EmbeddingRun | None = None
        self.behind: Mapping[int, HeadRun] = {}
        self._runs: list[dict[StageName, StageRun]] = [
            {name: StageRun(name, block, step) for name in STAGES} for block in blocks
        ]
        self._io: StageIO | None = None if x_TD is None else StageIO(x_TD)
        self._gradients: Gradients = {}
        self._coming: Handle[Arrivals] | None = None
        self._returning: Handle[Gradients] | None = None

    def __len__(self) -> int:
        """Blocks."""
        return len(self._runs)

    def forward(self) -> None:
        """All of it, in a row."""
        for place in range(len(self)):
            for move in FORWARD_ROW:
                self.move("F", place, move)

    def backward(self) -> None:
        """All of it but the weights, in a row."""
        for place in range(len(self)):
            for move in BACKWARD_ROW:
                self.move("B", place, move)

    def backward_weight(self) -> None:
        """Every gradient that was put off, in the order of the backward."""
        for place in range(len(self)):
            for name in reversed(STAGES):
                self._weight(len(self) - 1 - place, name)

    def move(self, side: Side, place: int, move: Move) -> None:
        """One small step.

        Args:
            place: of the block, counted in the direction of ``side``.
        """
        if side == "F":
            self._move_forward(place, move)
        else:
            self._move_backward(len(self) - 1 - place, move)

    def take_output(self) -> Tensor | None:
        """What the forward left; the pass forgets it.  None behind a head."""
        io, self._io = self._io, None
        return None if io is None else io.x_TD.detach()

    def turn(self, gradient_TD: Tensor | None) -> None:
        """Begin the backward, with the gradient of the output; None behind a head."""
        self._gradients = {} if gradient_TD is None else {"x_TD": gradient_TD}

    def take_gradient(self) -> Tensor | None:
        """What the backward left; None before an embedding."""
        gradients, self._gradients = self._gradients, {}
        return gradients.get("x_TD")

    def _move_forward(self, place: int, move: Move) -> None:
        run = self._runs[place][move.stage]
        if move.verb == "wait":
            assert self._coming is not None and self._io is not None, move
            self._io, self._coming = self._io.having(**self._coming.wait()), None
            return
        if move.stage == "attention_in" and place == 0 and self.before is not None:
            self._io = StageIO(self.before.forward())
        assert self._io is not None, move
        if move.verb == "start":
            assert self._coming is None, move
            self._io, self._coming = run.start_forward(self._io)
            return
        self._io = run.forward(self._io)
        if move.stage == "finish" and place in self.behind:
            x_TD = self.behind[place].forward(self._io.x_TD)
            self._io = None if x_TD is None else StageIO(x_TD)

    def _move_backward(self, place: int, move: Move) -> None:
        run = self._runs[place][move.stage]
        if move.verb == "weight":
            self._weight(place, move.stage)
            return
        if move.verb == "wait":
            assert self._returning is not None, move
            self._gradients, self._returning = joined(self._gradients, self._returning.wait()), None
            return
        if move.verb == "start":
            assert self._returning is None, move
            self._gradients, self._returning = run.start_backward(self._gradients)
            return
        if move.stage == "finish" and place in self.behind:
            self._gradients = {"x_TD": self.behind[place].backward_input(self._gradients.get("x_TD"))}
        self._gradients = run.backward_input(self._gradients)
        if move.stage == "attention_in" and place == 0 and self.before is not None:
            self.before.backward_input(self._gradients.pop("x_TD"))

    def _weight(self, place: int, name: StageName) -> None:
        self._runs[place][name].backward_weight()
        if name == "experts" and place in self.behind:  # the first that an interleaving can run after the head
            self.behind[place].backward_weight()
