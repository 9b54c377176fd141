"""One stage of the model on a rank, as the executor runs it: forward, backward of the input, backward of the weights.

A chunk is a run of blocks.  The first stage has the embedding before them; the last has, behind them, the final norm,
the head's loss and the MTP modules, whose blocks are run like the others.  What crosses a boundary between stages is
the residual stream alone, (T, D) in the dtype of activations: losses and MTP are on the last stage [V3 section 4.2: the
shallowest layers with the embedding and the deepest with the head are on one rank in DualPipe, and share it].

Every block is run as cut stages (``model/stages.py``), also where nothing is interleaved, so that any forward can be
paired with any backward.  ``I`` gives the gradient of the input and of what cannot wait (norms, embedding, head);
``W`` runs the queued products of weights.  A pass's graphs are gone after ``I``, its queues after ``W``, but for what a
pair leaves over: weights of one stage of one block, until the next pair or the next ``W`` of the chunk.

Legend: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from abyssal.model.block import Block
from abyssal.model.step import Step
from abyssal.model.transformer import Transformer
from abyssal.parallel.pipeline.chunk_ends import EmbeddingRun, HeadRun, Targets
from abyssal.parallel.pipeline.chunk_pass import ChunkPass
from abyssal.parallel.pipeline.interleaving import Placed


class Chunk(Protocol):
    """A stage of the model, or what stands in for one."""

    stage: int
    """Its place in the model, from 0."""
    num_stages: int

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        """The stage's output; its input is None in the first stage, its output in the last."""
        ...

    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        """The gradient of the stage's input from that of its output, each None where the other is."""
        ...

    def backward_weight(self, micro_batch: int) -> None:
        """The gradients of its weights that ``backward_input`` put off."""
        ...

    def catch_up(self) -> None:
        """What a pair has left over, if anything; the step ends."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What a stage is given of a micro-batch besides the hidden state; the same on all ranks of a pipeline."""

    make_step: Callable[[], Step]
    """A new step over its tokens: context, dispatcher, balance losses."""
    inputs: Sequence[Tensor]
    """Token ids (T,) that the main model reads, then those of each MTP depth.  Read on first and last stage only."""
    targets: Sequence[Targets]
    """Of the main model, then of each MTP depth.  Read on the last stage only."""


class ModelChunk:
    """Layers of a model.

    Args:
        model: may hold nothing but what this rank's chunks read.
        layers: which of its blocks; the MTP modules belong to the last stage besides.
        stage, num_stages: the chunk's place.

    Attributes:
        steps: of the micro-batches run since :meth:`begin`, their routings and balance losses.
        losses: on the last stage, by micro-batch: of the main model and of each MTP depth, as shares, without λ.

    Raises:
        ValueError: no layer.
    """

    def __init__(self, model: Transformer, layers: range, stage: int, num_stages: int) -> None:
        if not layers:
            raise ValueError(f"stage {stage} of {num_stages} has no layer; give fewer stages than layers")
        self.stage = stage
        self.num_stages = num_stages
        self.steps: dict[int, Step] = {}
        self.losses: dict[int, list[Tensor]] = {}
        self._model = model
        self._layers = layers
        self._micro_batches: Sequence[MicroBatch] = ()
        self._passes: dict[int, ChunkPass] = {}
        self._left_over: list[tuple[int, ChunkPass, Placed]] = []

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches of the next step, numbered as in the schedule."""
        self._micro_batches = micro_batches
        self._passes.clear()
        self._left_over.clear()
        self.steps, self.losses = {}, {}

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        one = self.start_pass(micro_batch, x_TD)
        one.forward()
        return self.output(micro_batch)

    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        one = self.turn_pass(micro_batch, gradient_TD)
        one.backward()
        return self.input_gradient(micro_batch)

    def backward_weight(self, micro_batch: int) -> None:
        self.catch_up()  # sums of gradients keep their order
        self._passes.pop(micro_batch).backward_weight()

    def put_off(self, micro_batch: int, moves: Sequence[Placed]) -> None:
        """Forget a pass whose weights' part has been run stage by stage, but for ``moves``, which are due."""
        one = self._passes.pop(micro_batch)
        self._left_over += [(micro_batch, one, move) for move in moves]

    def catch_up(self) -> None:
        left_over, self._left_over = self._left_over, []
        for micro_batch, one, placed in left_over:
            try:
                one.move(placed.side, placed.place, placed.move)
            except Exception as error:
                error.add_note(
                    f"in {placed.move} of stage {self.stage} for micro-batch {micro_batch}, left over by a pair"
                )
                raise

    def start_pass(self, micro_batch: int, x_TD: Tensor | None) -> ChunkPass:
        """The pass of a micro-batch, before its forward: for what runs it stage by stage."""
        given = self._micro_batches[micro_batch]
        self.steps[micro_batch] = step = given.make_step()
        made = ChunkPass(self._blocks(), step, x_TD)
        if self.is_first:
            made.before = EmbeddingRun(self._model, given.inputs[0])
        if self.is_last:
            losses = self.losses[micro_batch] = []
            made.behind = self._heads(given, losses)
        self._passes[micro_batch] = made
        return made

    def output(self, micro_batch: int) -> Tensor | None:
        """What a pass that has been run forward gives to the next stage."""
        x_TD = self._passes[micro_batch].take_output()
        return None if self.is_last else x_TD

    def turn_pass(self, micro_batch: int, gradient_TD: Tensor | None) -> ChunkPass:
        """The same pass, before its backward."""
        found = self._passes[micro_batch]
        found.turn(gradient_TD)
        return found

    def input_gradient(self, micro_batch: int) -> Tensor | None:
        """What a pass that has been run backward gives to the stage before."""
        return self._passes[micro_batch].take_gradient()

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = [self._model.layers[layer] for layer in self._layers]  # type: ignore[misc]
        if self.is_last:
            blocks += [module.block for module in self._model.mtp]  # type: ignore[misc]
        return blocks

    def _heads(self, given: MicroBatch, losses: list[Tensor]) -> dict[int, HeadRun]:
        """The head behind the last block of the main model, and behind each MTP module's."""
        return {
            len(self._layers) - 1 + depth: HeadRun(self._model, depth, given.inputs, given.targets, losses)
            for depth in range(len(self._model.mtp) + 1)
        }
