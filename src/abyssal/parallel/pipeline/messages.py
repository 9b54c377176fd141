"""Messages between stages: what they are, and point-to-point sends and receives that never make the sender wait.

A message is the output of a stage, or the gradient of its input, for one micro-batch; both sides know from the schedule
that it will come, and its shape and dtype.  Receives are posted before they are needed, so that a message that comes
early has a place to go; sends are handed to the backend at once and their tensors forgotten when they have gone.

Over gloo a message is told from others by its tag.  NCCL has no tags and runs what a pair of ranks sends one after
another, so there both sides post in one order that each derives from the schedule by itself
(:func:`posting_order`): whatever blocks then waits for something earlier in the order, and the earliest for nothing.

Legend: T tokens, D model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from abyssal.parallel.dispatch.lane import CommunicationError, Lane
from abyssal.parallel.pipeline.hidden import Timeline
from abyssal.parallel.pipeline.schedule_record import Schedule, Work

ProcessGroup = distributed.ProcessGroup


class PipelineError(RuntimeError):
    """A stage did not do what its schedule says, or a message did not come; names rank, stage and micro-batch."""


@dataclass(frozen=True)
class Boundary:
    """What crosses from stage to stage in one step."""

    shapes: Sequence[tuple[int, ...]]
    """By micro-batch: (T, D)."""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Message:
    """From one stage to its neighbour, for one micro-batch."""

    what: Literal["output", "gradient"]
    stage: int
    """That makes it: its output, or the gradient of its input."""
    micro_batch: int
    sender: int
    """Place in the pipeline's group, as is ``receiver``."""
    receiver: int

    def __str__(self) -> str:
        what = "output" if self.what == "output" else "input's gradient"
        return f"{what} of stage {self.stage} for micro-batch {self.micro_batch}"

    @property
    def stays(self) -> bool:
        """Both stages are on one rank."""
        return self.sender == self.receiver


def made_by(schedule: Schedule, work: Work) -> Message | None:
    """What ``work`` makes for another stage."""
    route = schedule.route(work.micro_batch)
    sender, stage = route[work.stage], work.stage
    if work.kind == "F" and stage < schedule.num_stages - 1:
        return Message("output", stage, work.micro_batch, sender, route[stage + 1])
    if work.sends_gradient and stage > 0:
        return Message("gradient", stage, work.micro_batch, sender, route[stage - 1])
    return None


def needed_by(schedule: Schedule, work: Work) -> Message | None:
    """What ``work`` needs of another stage."""
    route = schedule.route(work.micro_batch)
    receiver, stage = route[work.stage], work.stage
    if work.kind == "F" and stage > 0:
        return Message("output", stage - 1, work.micro_batch, route[stage - 1], receiver)
    if work.sends_gradient and stage < schedule.num_stages - 1:
        return Message("gradient", stage + 1, work.micro_batch, route[stage + 1], receiver)
    return None


def posting_order(schedule: Schedule) -> list[Message]:
    """Every message, in the order in which actions of one length would make them.

    Raises:
        ValueError: the schedule stops half-way, because actions wait for one another.
    """
    made: set[Message] = set()
    order: list[Message] = []
    places = [0] * schedule.num_ranks
    while any(place < len(actions) for place, actions in zip(places, schedule.actions, strict=True)):
        ready = []
        for rank, actions in enumerate(schedule.actions):
            if places[rank] < len(actions):
                needs = [needed_by(schedule, work) for work in actions[places[rank]].works]
                if all(need is None or need in made for need in needs):
                    ready.append(rank)
        if not ready:
            stuck = {rank: str(schedule.actions[rank][place]) for rank, place in enumerate(places)}
            raise ValueError(f"schedule {schedule.name} stops: its ranks wait for one another at {stuck}")
        for rank in ready:
            for work in schedule.actions[rank][places[rank]].works:
                message = made_by(schedule, work)
                if message is not None:
                    made.add(message)
                    order.append(message)
            places[rank] += 1
    return order


class Messenger:
    """Sends and receives one rank's messages; used for many steps, one after another.

    Args:
        schedule: whose messages they are.
        rank: this rank's place in ``group``.
        group: that nobody else uses meanwhile; None where all stages are on one rank.
        timeline: where what is sent, and waits, are noted.
        timeout: seconds after which a message that does not come, or go, is an error.
    """

    def __init__(
        self, schedule: Schedule, rank: int, group: ProcessGroup | None, timeline: Timeline, timeout: float
    ) -> None:
        self._num_stages = schedule.num_stages
        self._rank = rank
        self._group = group
        self._timeline = timeline
        self._timeout = timeout
        self._lane = Lane(torch.device("cpu"))
        self._boundary: Boundary | None = None
        self._arriving: dict[Message, tuple[Tensor, Any]] = {}
        self._local: dict[Message, Tensor] = {}
        self._leaving: list[tuple[float, Any]] = []

    def begin(self, boundary: Boundary) -> None:
        """A step begins."""
        self._boundary = boundary

    def close(self) -> None:
        """End the thread that waits for what is being sent."""
        self._lane.close()

    def post(self, message: Message) -> None:
        """Make a place for what will come."""
        if message.stays or message in self._arriving:
            return
        assert self._boundary is not None and self._group is not None
        shape = self._boundary.shapes[message.micro_batch]
        buffer_TD = torch.empty(shape, dtype=self._boundary.dtype, device=self._boundary.device)
        try:
            work = self._group.recv([buffer_TD], message.sender, self._tag(message))
        except RuntimeError as error:
            raise self._failed(message, error) from error
        self._arriving[message] = buffer_TD, work

    def receive(self, message: Message) -> Tensor:
        """What was posted, once it is there.

        Raises:
            PipelineError: it did not come in time, or its sender is gone.
        """
        if message.stays:
            return self._local.pop(message)
        self.post(message)
        buffer_TD, work = self._arriving.pop(message)
        with self._timeline.waiting():
            try:
                work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise self._failed(message, error) from error
        return buffer_TD

    def send(self, message: Message, tensor_TD: Tensor) -> None:
        """Let it go; it must not change any more."""
        if message.stays:
            self._local[message] = tensor_TD
            return
        assert self._group is not None
        began = self._timeline.clock()
        tensor_TD = tensor_TD.contiguous()
        try:
            work = self._group.send([tensor_TD], message.receiver, self._tag(message))
        except RuntimeError as error:
            raise self._failed(message, error) from error
        self._leaving.append((began, self._lane.submit(f"send {message}", _Gone(work, tensor_TD, self._timeout))))

    def finish(self) -> None:
        """Wait until everything has gone.

        Raises:
            PipelineError: something did not, because its receiver did not take it in time, or is gone.
        """
        leaving, self._leaving = self._leaving, []
        for began, job in leaving:
            with self._timeline.waiting():
                try:
                    ended = job.wait()
                except CommunicationError as error:
                    raise PipelineError(f"rank {self._rank} of the pipeline: {error}") from error
            self._timeline.communicated(began, ended)
        assert not self._arriving and not self._local, "a schedule that is complete takes what it is given"

    def _tag(self, message: Message) -> int:
        number = message.micro_batch * self._num_stages + message.stage
        return 2 * number + (message.what == "gradient")

    def _failed(self, message: Message, error: Exception) -> PipelineError:
        coming = message.receiver == self._rank
        other = message.sender if coming else message.receiver
        deed = "did not come from" if coming else "could not be sent to"
        return PipelineError(
            f"rank {self._rank} of the pipeline: the {message} {deed} rank {other}, which has failed or hangs (waited "
            f"up to {self._timeout:g} s): {error}"
        )


class _Gone:
    """Waits until a tensor has been sent, holding it until then; gives the time."""

    def __init__(self, work: Any, tensor_TD: Tensor, timeout: float) -> None:
        self._work = work
        self._tensor_TD = tensor_TD
        self._timeout = timeout

    def __call__(self) -> float:
        self._work.wait(timedelta(seconds=self._timeout))
        return time.perf_counter()
