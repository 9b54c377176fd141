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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from abyssal.parallel.dispatch.lane import CommunicationError, Job, Lane
from abyssal.parallel.pipeline.hidden import Stopwatch
from abyssal.parallel.pipeline.schedule_record import Schedule, Work
from abyssal.parallel.pipeline.simulate import simulate

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
    """Every message between ranks, in the order in which actions of one length would make them."""
    found: list[tuple[float, int, Message]] = []
    for rank, spans in enumerate(simulate(schedule).spans):
        for span in spans:
            messages = [made_by(schedule, work) for work in span.action.works]
            found += [(span.end, rank, message) for message in messages if message is not None and not message.stays]
    return [message for *_, message in sorted(found, key=lambda one: one[:2])]


class Messenger:
    """Sends and receives one rank's messages; used for many steps, one after another.

    Args:
        schedule: whose messages they are.
        rank: this rank's place in ``group``.
        group: that nobody else uses meanwhile; None where all stages are on one rank.
        stopwatch: where what is sent, and waits, are noted.
        timeout: seconds after which a message that does not come, or go, is an error.  (Over NCCL its own watchdog's.)
        ordered: tell messages apart by their order; by default for tensors of a GPU, as NCCL has no tags.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        group: ProcessGroup | None,
        stopwatch: Stopwatch,
        timeout: float,
        ordered: bool | None = None,
    ) -> None:
        self._schedule = schedule
        self._rank = rank
        self._group = group
        self._stopwatch = stopwatch
        self._timeout = timeout
        self._lane = Lane(torch.device("cpu"))
        self._ordered = ordered
        self._order: list[Message] | None = None
        self._due: deque[Message] = deque()
        self._boundary: Boundary | None = None
        self._arriving: dict[Message, tuple[Tensor, Any]] = {}
        self._local: dict[Message, Tensor] = {}
        self._leaving: list[tuple[float, Job[float]]] = []

    def begin(self, boundary: Boundary) -> None:
        """A step begins."""
        self._boundary = boundary
        ordered = boundary.device.type == "cuda" if self._ordered is None else self._ordered
        if ordered and self._order is None:
            order = posting_order(self._schedule)
            self._order = [one for one in order if self._rank in (one.sender, one.receiver)]
        self._due.extend(self._order or ())
        self._post_due()

    def close(self) -> None:
        """End the thread that waits for what is being sent."""
        self._lane.close()

    def post(self, message: Message) -> None:
        """Make a place for what will come; where there is an order, that was done when it was its turn."""
        if not message.stays and self._order is None and message not in self._arriving:
            self._post(message)

    def receive(self, message: Message) -> Tensor:
        """What was posted, once it is there.

        Raises:
            PipelineError: it did not come in time, or its sender is gone.
        """
        if message.stays:
            return self._local.pop(message)
        buffer_TD, work = self._arriving.pop(message)
        with self._stopwatch.waiting():
            try:
                _wait(work, buffer_TD, self._timeout)
            except RuntimeError as error:
                raise self._failed(message, error) from error
        return buffer_TD

    def send(self, message: Message, tensor_TD: Tensor) -> None:
        """Let it go; it must not change any more."""
        if message.stays:
            self._local[message] = tensor_TD
            return
        assert self._group is not None
        if self._order is not None:
            assert self._due.popleft() == message, "what a rank makes is in the order of the schedule"
        began = self._stopwatch.clock()
        tensor_TD = tensor_TD.contiguous()
        try:
            work = self._group.send([tensor_TD], message.receiver, self._tag(message))
        except RuntimeError as error:
            raise self._failed(message, error) from error
        gone = _Gone(work, tensor_TD, self._timeout, self._stopwatch.clock)
        self._leaving.append((began, self._lane.submit(f"the {message} for rank {message.receiver}", gone)))
        self._post_due()

    def finish(self) -> None:
        """Wait until everything has gone.

        Raises:
            PipelineError: something did not, because its receiver did not take it in time, or is gone.
        """
        leaving, self._leaving = self._leaving, []
        for began, job in leaving:
            with self._stopwatch.waiting():
                try:
                    ended = job.wait()
                except CommunicationError as error:
                    raise PipelineError(f"rank {self._rank} of the pipeline could not send {error}") from error
            self._stopwatch.communicated(began, ended)
        assert not self._arriving and not self._local, "a schedule that is complete takes what it is given"

    def _post_due(self) -> None:
        """Receives up to the next message that this rank is to send itself."""
        while self._due and self._due[0].sender != self._rank:
            self._post(self._due.popleft())

    def _post(self, message: Message) -> None:
        assert self._boundary is not None and self._group is not None
        shape = self._boundary.shapes[message.micro_batch]
        buffer_TD = torch.empty(shape, dtype=self._boundary.dtype, device=self._boundary.device)
        try:
            work = self._group.recv([buffer_TD], message.sender, self._tag(message))
        except RuntimeError as error:
            raise self._failed(message, error) from error
        self._arriving[message] = buffer_TD, work

    def _tag(self, message: Message) -> int:
        if self._order is not None:
            return 0
        number = message.micro_batch * self._schedule.num_stages + message.stage
        return 2 * number + (message.what == "gradient")

    def _failed(self, message: Message, error: Exception) -> PipelineError:
        coming = message.receiver == self._rank
        other = message.sender if coming else message.receiver
        deed = "did not come from" if coming else "could not be sent to"
        return PipelineError(
            f"rank {self._rank} of the pipeline: the {message} {deed} rank {other}, which has failed or hangs (waited "
            f"up to {self._timeout:g} s): {error}"
        )


def _wait(work: Any, tensor_TD: Tensor, timeout: float) -> None:
    """Until the message is there; on a GPU the stream waits, not the thread."""
    if tensor_TD.is_cuda:
        work.wait()
    else:
        work.wait(timedelta(seconds=timeout))


class _Gone:
    """Waits until a tensor has been sent, and holds it until then; gives the time."""

    def __init__(self, work: Any, tensor_TD: Tensor, timeout: float, clock: Callable[[], float]) -> None:
        self._work = work
        self._tensor_TD = tensor_TD
        self._timeout = timeout
        self._clock = clock

    def __call__(self) -> float:
        if self._tensor_TD.is_cuda:
            while not self._work.is_completed():  # waiting would make this thread's stream wait, not the thread
                time.sleep(_POLL)
        else:
            self._work.wait(timedelta(seconds=self._timeout))
        return self._clock()


_POLL = 2e-4
"""Seconds: a tenth of what a message between stages takes."""
