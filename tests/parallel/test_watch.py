"""A rank that dies, stops, hangs or fails ends all ranks within the set time, and is named once by each."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.forked_ranks import Ended, RankStarter

TIMEOUT = 3.0
STEPS = 500


def _ends(starter: RankStarter, world_size: int, *mischief: str, steps: int = STEPS) -> dict[int, Ended]:
    return starter.start(world_size, "watched", str(TIMEOUT), str(steps), *mischief).wait()


def _told_once(ends: dict[int, Ended], message: str, silent: int | None = None) -> None:
    """Each rank tells the message, once, and nothing else; ``silent`` cannot."""
    for rank, end in ends.items():
        if rank != silent:
            assert end.errors.count("the run: ") == 1 and message in end.errors, (rank, end)
            assert "Connection closed" not in end.errors and "gloo" not in end.errors


def test_ranks_that_do_well_leave_without_a_word(rank_starter: RankStarter) -> None:
    ends = _ends(rank_starter, 3, steps=5)
    assert {(end.code, end.output, end.errors) for end in ends.values()} == {(0, "", "")}


@pytest.mark.slow
def test_a_rank_may_stand_still_where_that_is_expected(rank_starter: RankStarter) -> None:
    ends = _ends(rank_starter, 3, "1", "patience", "2", steps=5)
    assert {(end.code, end.output, end.errors) for end in ends.values()} == {(0, "", "")}


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_ends_all_and_each_shows_its_traceback(rank_starter: RankStarter, culprit: int) -> None:
    ends = _ends(rank_starter, 3, str(culprit), "raise", "5")
    assert {end.code for end in ends.values()} == {1}
    _told_once(ends, f"rank {culprit} of 3 ")
    for end in ends.values():
        assert "failed (step 5, adding)" in end.errors
        assert end.errors.count("Traceback") == 1 and end.errors.rstrip().endswith("KeyError: 'the missing expert'")


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_killed_rank_is_named_at_once(rank_starter: RankStarter, culprit: int) -> None:
    ends = _ends(rank_starter, 3, str(culprit), "kill", "5")
    assert ends[culprit].code == -signal.SIGKILL
    assert {end.code for rank, end in ends.items() if rank != culprit} == {1}
    _told_once(ends, f"rank {culprit} of 3 ", silent=culprit)
    assert all("is gone" in end.errors for rank, end in ends.items() if rank != culprit)
    assert max(end.at for end in ends.values()) - ends[culprit].at < TIMEOUT


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named_and_does_not_stay_behind(rank_starter: RankStarter, culprit: int) -> None:
    started = rank_starter.start(3, "watched", str(TIMEOUT), "3000")
    time.sleep(1.0)
    os.kill(started.pids[culprit], signal.SIGSTOP)
    begin = time.monotonic()
    ends = started.wait()
    assert ends[culprit].code == -signal.SIGKILL
    _told_once(ends, f"rank {culprit} of 3 ", silent=culprit)
    assert all("gave no sign of life for" in end.errors for rank, end in ends.items() if rank != culprit)
    assert max(end.at for end in ends.values()) - begin < TIMEOUT + 1


def test_a_hung_rank_is_named_with_where_it_stands(rank_starter: RankStarter) -> None:
    begin = time.monotonic()
    ends = _ends(rank_starter, 3, "1", "hang", "5")
    _told_once(ends, "rank 1 of 3 ")
    for end in ends.values():
        assert end.code == 1 and "made no progress" in end.errors and end.errors.rstrip().endswith("time.sleep(600)")
    assert max(end.at for end in ends.values()) - begin < TIMEOUT + 3


@pytest.mark.slow
def test_ranks_in_different_collectives_are_told_so(rank_starter: RankStarter) -> None:
    ends = _ends(rank_starter, 2, "1", "skip", "5")
    _told_once(ends, "wait for one another")
    assert all("in all_reduce" in end.errors or "in barrier" in end.errors for end in ends.values())


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_problem_of_the_users_is_one_line_of_the_first_rank(rank_starter: RankStarter, culprit: int) -> None:
    ends = _ends(rank_starter, 2, str(culprit), "problem", "5")
    assert [end.code for end in ends.values()] == [2, 2] and ends[1].errors == ""
    told = ends[0].errors.strip()
    assert told.startswith("the run: ") and told.endswith("the text ends too soon") and "\n" not in told
    assert ("rank 1" in told) == (culprit == 1)


def test_a_slow_rank_is_named(rank_starter: RankStarter) -> None:
    ends = _ends(rank_starter, 3, "1", "slow", "0", steps=25)
    named = ends[0].output.split()
    assert named[:2] == ["slow:", "1"] and float(named[2]) > 1.5, ends
    assert {end.code for end in ends.values()} == {0}


@pytest.mark.slow
def test_a_launcher_that_ends_a_rank_gets_it_ended(rank_starter: RankStarter) -> None:
    started = rank_starter.start(1, "watched", str(TIMEOUT), "30000")
    time.sleep(1.0)
    os.kill(started.pids[0], signal.SIGTERM)
    assert started.wait()[0].code == 128 + signal.SIGTERM
