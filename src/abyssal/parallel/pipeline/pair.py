"""The overlapped pair: a forward and a backward of two micro-batches, their stages interleaved [V3 section 3.2.1].

What is done, and in which order, is an :class:`~abyssal.parallel.pipeline.interleaving.Interleaving`; here it is
carried out, move by move, on two passes.  Between a start and its wait the dispatcher's communication goes on by itself
(a thread over gloo, a stream on a GPU), while the moves of the other side compute.  Nothing else changes: the two share
no activations and no gradient, so that each number has the bits that it has when one runs after the other.

Weights that the interleaving leaves over run in the next pair, under its first communication; their chunk keeps them
until then, and runs them itself where something else of its weights comes first.

Legend: T tokens, D model.
"""

from __future__ import annotations

from torch import Tensor

from abyssal.parallel.pipeline.chunk import Chunk, ModelChunk
from abyssal.parallel.pipeline.interleaving import V3, Interleaving


class OverlappedPair:
    """Runs two works that overlap; for the executor's ``pair``.  Both chunks are the model's."""

    def __init__(self, interleaving: Interleaving = V3) -> None:
        self.interleaving = interleaving

    def __call__(
        self,
        ahead: Chunk,
        forward: int,
        x_TD: Tensor | None,
        back: Chunk,
        backward: int,
        gradient_TD: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Output of the chunk ``ahead`` for micro-batch ``forward``, input gradient of ``back`` for ``backward``."""
        assert isinstance(ahead, ModelChunk) and isinstance(back, ModelChunk)
        passes = {"F": ahead.start_pass(forward, x_TD), "B": back.turn_pass(backward, gradient_TD)}
        counts = len(passes["F"]), len(passes["B"])
        for one in self.interleaving.unrolled(*counts):
            if one.place < 0:
                ahead.catch_up()
                back.catch_up()
            else:
                passes[one.side].move(one.side, one.place, one.move)
        dx_TD = back.input_gradient(backward)
        back.put_off(backward, self.interleaving.left_over(*counts))
        return ahead.output(forward), dx_TD
