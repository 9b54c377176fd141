"""The thread on which a dispatcher's communication goes on: order, failures, its end; and bytes counted by link."""

from __future__ import annotations

import threading

import pytest
import torch

from abyssal.parallel.dispatch.lane import CommunicationError, Lane
from abyssal.parallel.dispatch.links import LinkBytes, Traffic
from abyssal.parallel.watch_stack import root_of


@pytest.fixture
def lane():
    lane = Lane(torch.device("cpu"))
    yield lane
    lane.close()


def test_work_runs_in_the_order_of_its_start_while_the_caller_goes_on(lane) -> None:
    gate, done = threading.Event(), []
    first = lane.submit("first", lambda: gate.wait(10) and done.append(1))
    second = lane.submit("second", lambda: done.append(2))
    assert done == []
    gate.set()
    second.wait()
    assert done == [1, 2] and first.wait() is None


def test_no_graph_is_built_on_the_thread(lane) -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not lane.submit("product", lambda: weight * 2).wait().requires_grad


def test_a_failure_is_raised_by_wait_each_time_and_ends_what_comes_after(lane) -> None:
    def fail() -> None:
        raise OSError("connection reset")

    before = lane.submit("plan of layer 1", lambda: 5)
    broken = lane.submit("dispatch of layer 1", fail)
    after = lane.submit("combine of layer 1", lambda: pytest.fail("it met another collective of its peers"))
    with pytest.raises(CommunicationError, match=r"^dispatch of layer 1: connection reset$"):
        broken.wait()
    with pytest.raises(CommunicationError) as again:
        broken.wait()
    assert isinstance(again.value.__cause__, OSError)
    with pytest.raises(
        CommunicationError, match=r"^combine of layer 1: not done, because before it: dispatch of l"
    ) as late:
        after.wait()
    assert root_of(late.value) is again.value.__cause__, (
        "what comes after tells, too, that another rank may be the cause"
    )
    assert before.wait() == 5


def test_close_ends_the_thread_after_what_was_queued() -> None:
    lane, done = Lane(torch.device("cpu")), []
    before = threading.active_count()
    job = lane.submit("work", lambda: done.append(1))
    assert threading.active_count() == before + 1
    lane.close()
    lane.close()
    assert done == [1] and threading.active_count() == before and job.wait() is None
    with pytest.raises(CommunicationError, match="dispatch of layer 2: the dispatcher is closed; open another"):
        lane.submit("dispatch of layer 2", lambda: None)


def test_a_lane_that_is_forgotten_ends_its_thread() -> None:
    lane, before = Lane(torch.device("cpu")), threading.active_count()
    lane.submit("work", lambda: None).wait()
    thread = next(thread for thread in threading.enumerate() if thread.name == "dispatch")
    del lane
    thread.join(10)
    assert not thread.is_alive() and threading.active_count() == before


def test_close_leaves_work_that_hangs_to_itself() -> None:
    lane, gate = Lane(torch.device("cpu")), threading.Event()
    job = lane.submit("work", lambda: gate.wait(10))
    lane.close(timeout=0.05)
    gate.set()
    assert job.wait() is True


def test_bytes_are_counted_by_the_link_they_take() -> None:
    traffic = Traffic()
    traffic.dispatch.add([5, 7, 0, 11], nodes=[0, 0, 1, 1], rank=0)
    traffic.dispatch.add([1, 2, 3, 4], nodes=[0, 0, 1, 1], rank=3)
    assert traffic.dispatch == LinkBytes(stayed=9, inside=10, across=14, messages=5)
    assert traffic.combine == LinkBytes()
    traffic.reset()
    assert traffic == Traffic()
