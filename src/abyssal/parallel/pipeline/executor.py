"""Runs this rank's actions of any pipeline schedule: takes what one needs, lets its chunk do it, sends the result.

The executor knows nothing of models: a chunk is whatever has the methods of
:class:`~abyssal.parallel.pipeline.chunk.Chunk`, one that only sleeps too, and a pair of works that overlap is run by
what it is given for that.  It waits for nothing but what an action needs; whatever it makes is sent while it goes on.

Errors name rank, stage and micro-batch.  A rank that fails leaves the others without messages, so each of them fails
too, at once when the connection breaks and after ``timeout`` seconds when it does not: nothing hangs.

Legend: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from abyssal.parallel.pipeline.chunk import Chunk
from abyssal.parallel.pipeline.hidden import StepTimes, Stopwatch
from abyssal.parallel.pipeline.messages import Boundary, Messenger, PipelineError, ProcessGroup, made_by, needed_by
from abyssal.parallel.pipeline.schedule_check import check
from abyssal.parallel.pipeline.schedule_record import Action, Schedule, Work

AHEAD = 3
"""Actions for which receives are posted before they are run: enough for two neighbours to be early at once."""

Pair = Callable[[Chunk, int, Tensor | None, Chunk, int, Tensor | None], tuple[Tensor | None, Tensor | None]]
"""Forward of a chunk for a micro-batch with its input, and whole backward of a chunk for another with the gradient of
its output: the first's output and the second's input gradient."""


def one_after_the_other(
    ahead: Chunk, forward: int, x_TD: Tensor | None, back: Chunk, backward: int, gradient_TD: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The pair that overlaps nothing."""
    y_TD = ahead.forward(forward, x_TD)
    dx_TD = back.backward_input(backward, gradient_TD)
    back.backward_weight(backward)
    return y_TD, dx_TD


class Executor:
    """One rank of a pipeline.

    Args:
        schedule: of as many ranks as the group has.
        rank: this rank's place in the group.
        chunks: this rank's, in the schedule's order.
        group: for messages between stages, used by nobody else meanwhile; None for a schedule of one rank.
        pair: what runs two works that overlap.
        stopwatch: where times are noted; give the same to a ``MeasuredDispatcher``.
        timeout: seconds after which a message that does not come is an error.
        ordered: messages are told apart by their order, not by tags; by default on GPUs, as NCCL has no tags.

    Raises:
        ValueError: a schedule that is not complete or would never end, or does not fit the group or the chunks.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        chunks: Sequence[Chunk],
        group: ProcessGroup | None = None,
        pair: Pair = one_after_the_other,
        stopwatch: Stopwatch | None = None,
        timeout: float = 60.0,
        ordered: bool | None = None,
    ) -> None:
        check(schedule)
        _check_fits(schedule, rank, chunks, group)
        self.schedule = schedule
        self.rank = rank
        self._chunks = chunks
        self._pair = pair
        self._actions = schedule.actions[rank]
        works = [work for action in self._actions for work in action.works]
        self._needs = {work: needed_by(schedule, work) for work in works}
        self._makes = {work: made_by(schedule, work) for work in works}
        self._stopwatch = stopwatch or Stopwatch()
        self._messages = Messenger(schedule, rank, group, self._stopwatch, timeout, ordered)

    def close(self) -> None:
        """End the executor's thread."""
        self._messages.close()

    def run(self, boundary: Boundary) -> StepTimes:
        """One step: every micro-batch forward and backward.

        Args:
            boundary: of all the schedule's micro-batches.

        Raises:
            ValueError: other micro-batches than the schedule's.
            PipelineError: a chunk returned something else than the boundary says, or a message did not come.
        """
        if len(boundary.shapes) != self.schedule.num_micro_batches:
            raise ValueError(
                f"{len(boundary.shapes)} micro-batches for a schedule {self.schedule.name} of "
                f"{self.schedule.num_micro_batches}; make the schedule for as many as a step has"
            )
        self._stopwatch.begin()
        self._messages.begin(boundary)
        for place, action in enumerate(self._actions):
            for later in self._actions[place : place + 1 + AHEAD]:
                self._post(later)
            given = [self._take(work) for work in action.works]
            try:
                made = self._do(action, given)
            except Exception as error:
                error.add_note(f"in rank {self.rank} of the pipeline, {action}")
                raise
            for work, result in zip(action.works, made, strict=True):
                self._give(work, result, boundary)
        self._catch_up()
        self._messages.finish()
        return self._stopwatch.times()

    def _post(self, action: Action) -> None:
        for work in action.works:
            message = self._needs[work]
            if message is not None:
                self._messages.post(message)

    def _take(self, work: Work) -> Tensor | None:
        message = self._needs[work]
        return None if message is None else self._messages.receive(message)

    def _do(self, action: Action, given: list[Tensor | None]) -> Sequence[Tensor | None]:
        if action.is_pair:
            (forward, backward), (x_TD, gradient_TD) = action.works, given
            ahead, back = self._chunks[forward.chunk], self._chunks[backward.chunk]
            return self._pair(ahead, forward.micro_batch, x_TD, back, backward.micro_batch, gradient_TD)
        (work,), (tensor_TD,) = action.works, given
        chunk = self._chunks[work.chunk]
        if work.kind == "F":
            return (chunk.forward(work.micro_batch, tensor_TD),)
        dx_TD = None if work.kind == "W" else chunk.backward_input(work.micro_batch, tensor_TD)
        if work.kind != "I":
            chunk.backward_weight(work.micro_batch)
        return (dx_TD,)

    def _catch_up(self) -> None:
        for chunk in self._chunks:
            try:
                chunk.catch_up()
            except Exception as error:
                error.add_note(f"in rank {self.rank} of the pipeline, at the end of the step")
                raise

    def _give(self, work: Work, result: Tensor | None, boundary: Boundary) -> None:
        message = self._makes[work]
        expected = None if message is None else (tuple(boundary.shapes[work.micro_batch]), boundary.dtype)
        found = None if result is None else (tuple(result.shape), result.dtype)
        if found != expected:
            raise PipelineError(
                f"rank {self.rank} of the pipeline, {work}: returned {_described(found)}, and the next stage expects "
                f"{_described(expected)}; the chunk does not fit the boundary that the step was given"
            )
        if message is not None and result is not None:
            self._messages.send(message, result)


def _described(tensor: tuple[tuple[int, ...], object] | None) -> str:
    return "nothing" if tensor is None else f"a tensor of shape {tensor[0]} in {tensor[1]}"


def _check_fits(schedule: Schedule, rank: int, chunks: Sequence[Chunk], group: ProcessGroup | None) -> None:
    size = 1 if group is None else group.size()
    if schedule.num_ranks != size:
        raise ValueError(
            f"schedule {schedule.name} is of {schedule.num_ranks} ranks, the group of {size}; make it anew"
        )
    stages = [(chunk.stage, chunk.num_stages) for chunk in chunks]
    wanted = [(stage, schedule.num_stages) for stage in schedule.chunks[rank]]
    if stages != wanted:
        raise ValueError(
            f"rank {rank} has chunks of stages {stages} (stage, of how many); schedule {schedule.name} wants {wanted}"
        )
