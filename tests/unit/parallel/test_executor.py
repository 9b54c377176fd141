"""The executor with chunks that sleep: order, messages, times, and errors that name what failed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.parallel.pipeline.executor import Executor
from abyssal.parallel.pipeline.hidden import StepTimes, Stopwatch
from abyssal.parallel.pipeline.messages import PipelineError
from abyssal.parallel.pipeline.schedule import Schedule, schedule
from abyssal.parallel.pipeline.simulate import Duration, Times, simulate
from tests.support.sleeping_stages import SleepingChunk, boundary, chunks_of, on_threads, results

NAMES = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")
STEPS = 2


def run(
    plan: Schedule,
    unit: float = 0.0,
    ordered: bool | None = None,
    timeout: float = 20.0,
    **replaced: type[SleepingChunk],
) -> list[Any]:
    """Of every rank: its chunks and the times of its steps, or what it raised."""

    def on_rank(rank: int, group: Any) -> tuple[list[SleepingChunk], list[StepTimes]]:
        chunks = chunks_of(plan, rank, unit)
        for place, chunk in enumerate(chunks):
            if f"stage{chunk.stage}" in replaced:
                chunks[place] = replaced[f"stage{chunk.stage}"](chunk.stage, plan.num_stages, unit)
        executor = Executor(plan, rank, chunks, group, timeout=timeout, ordered=ordered)
        try:
            return chunks, [executor.run(boundary(plan.num_micro_batches)) for _ in range(STEPS)]
        finally:
            executor.close()

    return on_threads(plan.num_ranks, on_rank)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("name", NAMES)
def test_every_work_is_done_in_order_and_given_its_own_messages(name: str, ranks: int, ordered: bool) -> None:
    """Also without tags, where messages are told apart by their order alone."""
    plan = schedule(name, ranks, 2 * ranks + 2)
    for rank, (chunks, _) in enumerate(results(run(plan, ordered=ordered))):
        for place, chunk in enumerate(chunks):
            works = [work for action in plan.actions[rank] for work in action.works if work.chunk == place]
            split = [(kind, work.micro_batch) for work in works for kind in ("IW" if work.kind == "B" else work.kind)]
            assert chunk.done == split * STEPS


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 3), ("zb1p", 4), ("dualpipe", 4), ("dualpipev", 2)])
def test_it_takes_as_long_as_the_simulator_says(name: str, ranks: int) -> None:
    """Within five percent, the simulator being told how long each sleep lasted; and no less than they should have."""
    plan, unit = schedule(name, ranks, 8), 0.03
    found = results(on_threads(ranks, _Timed(plan, unit)))
    begin, end = min(began for _, began, _ in found), max(ended for *_, ended in found)
    lasted = {
        (kind, chunk.stage, micro_batch, rank): seconds
        for rank, (chunks, *_) in enumerate(found)
        for chunk in chunks
        for (kind, micro_batch), seconds in chunk.lasted.items()
    }

    def part(kind: str) -> Duration:
        return lambda work, rank: lasted[kind, work.stage, work.micro_batch, rank]

    wanted = simulate(plan, Times(part("F"), part("I"), part("W"))).makespan
    assert end - begin == pytest.approx(wanted, rel=0.05)
    assert end - begin > simulate(plan).makespan * unit


class _Timed:
    """One step on each rank, begun together: its chunks, when it began and when it ended."""

    def __init__(self, plan: Schedule, unit: float) -> None:
        self._plan = plan
        self._unit = unit
        self._together = threading.Barrier(plan.num_ranks)

    def __call__(self, rank: int, group: Any) -> tuple[list[SleepingChunk], float, float]:
        chunks = chunks_of(self._plan, rank, self._unit)
        executor = Executor(self._plan, rank, chunks, group)
        self._together.wait()
        began = time.perf_counter()
        executor.run(boundary(self._plan.num_micro_batches))
        ended = time.perf_counter()
        executor.close()
        return chunks, began, ended


def test_what_is_wrong_before_it_runs_is_said() -> None:
    plan = schedule("1f1b", 1, 4)
    with pytest.raises(ValueError, match="is of 2 ranks, the group of 1"):
        Executor(schedule("1f1b", 2, 4), 0, [SleepingChunk(0, 2)])
    with pytest.raises(ValueError, match=r"chunks of stages \[\(1, 2\)\].*wants \[\(0, 1\)\]"):
        Executor(plan, 0, [SleepingChunk(1, 2)])
    executor = Executor(plan, 0, [SleepingChunk(0, 1)])
    with pytest.raises(ValueError, match="3 micro-batches for a schedule 1f1b of 4"):
        executor.run(boundary(3))
    executor.run(boundary(4))
    executor.close()


class WrongShape(SleepingChunk):
    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        y_TD = super().forward(micro_batch, x_TD)
        return torch.zeros(2, 3) if micro_batch == 2 else y_TD


class WrongDtype(SleepingChunk):
    def backward_input(self, micro_batch: int, gradient_TD: Tensor | None) -> Tensor | None:
        dx_TD = super().backward_input(micro_batch, gradient_TD)
        return None if dx_TD is None else dx_TD.double()


class Nothing(SleepingChunk):
    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        return None


class LeavesOver(SleepingChunk):
    """Its last weights wait until it is told to catch up, as a pair's do."""

    def backward_weight(self, micro_batch: int) -> None:
        self.catch_up()
        self.late = micro_batch

    def catch_up(self) -> None:
        late, self.late = getattr(self, "late", None), None
        if late is not None:
            super().backward_weight(late)


class FailsLate(LeavesOver):
    def catch_up(self) -> None:
        if getattr(self, "late", None) == 5:
            raise MemoryError("no more")
        super().catch_up()


def test_what_is_left_over_is_done_before_a_step_ends() -> None:
    for chunks, _ in results(run(schedule("1f1b", 2, 6), stage0=LeavesOver, stage1=LeavesOver)):
        done = chunks[0].done
        half = len(done) // STEPS
        for step in (done[:half], done[half:]):
            assert sorted(step) == [(kind, number) for kind in "FIW" for number in range(6)]
    found = run(schedule("1f1b", 2, 6), stage1=FailsLate, timeout=2.0)
    assert isinstance(found[1], MemoryError)
    assert found[1].__notes__ == ["in rank 1 of the pipeline, at the end of the step"]


class Fails(SleepingChunk):
    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        if micro_batch == 3:
            raise KeyError("the missing expert")
        return super().forward(micro_batch, x_TD)


class Hangs(SleepingChunk):
    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        if micro_batch == 3:
            time.sleep(1.5)
        return super().forward(micro_batch, x_TD)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (WrongShape, r"rank 1 .*F of stage 1 for micro-batch 2: returned a tensor of shape \(2, 3\) .* \(1, 3\)"),
        (WrongDtype, r"rank 1 .*B of stage 1 for micro-batch 0: returned .* in torch.float64.* in torch.float32"),
        (Nothing, r"rank 1 .*F of stage 1 for micro-batch 0: returned nothing"),
    ],
)
def test_a_stage_that_returns_something_else_is_named_and_nobody_hangs(
    chunk: type[SleepingChunk], message: str
) -> None:
    began = time.monotonic()
    found = run(schedule("1f1b", 3, 6), stage1=chunk, timeout=2.0)
    with pytest.raises(PipelineError, match=message):
        raise found[1]
    for rank in (0, 2):
        assert isinstance(found[rank], PipelineError) and f"rank {rank} of the pipeline" in str(found[rank])
        assert "micro-batch" in str(found[rank])
    assert time.monotonic() - began < 20


def test_an_exception_in_a_stage_keeps_its_type_and_says_where() -> None:
    found = run(schedule("1f1b", 2, 6), stage1=Fails, timeout=2.0)
    assert isinstance(found[1], KeyError)
    assert found[1].__notes__ == ["in rank 1 of the pipeline, F of stage 1 for micro-batch 3"]
    assert isinstance(found[0], PipelineError) and "from rank 1" in str(found[0])


def test_a_peer_that_hangs_is_given_up_after_the_timeout() -> None:
    found = run(schedule("1f1b", 2, 6), stage1=Hangs, timeout=0.5)
    with pytest.raises(
        PipelineError, match=r"gradient of stage 1 for micro-batch 2 did not come from rank 1|micro-batch 3"
    ):
        raise found[0]
    assert isinstance(found[1], PipelineError)


def test_hidden_is_what_of_a_communication_was_not_waited_through() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])

    def wait(seconds: float) -> None:
        with watch.waiting():
            now[0] += seconds

    assert watch.times() == StepTimes(0.0, 0.0, 0.0, 0.0) and watch.times().hidden_share is None
    now[0] = 3.0  # computed
    wait(2.0)
    now[0] = 9.0
    watch.communicated(1.0, 4.0)  # 2 under computation, 1 waited for
    watch.communicated(4.5, 7.0)  # 0.5 waited for
    times = watch.times()
    assert times == StepTimes(9.0, 2.0, 5.5, 4.0)
    assert times.computing == 7.0 and times.hidden_share == pytest.approx(4 / 5.5)
    watch.begin()
    assert watch.times() == StepTimes(0.0, 0.0, 0.0, 0.0)
