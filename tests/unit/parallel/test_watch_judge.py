"""Judgement over heartbeats, slow ranks, and what a message says."""

from __future__ import annotations

import inspect
import threading
import time
from dataclasses import replace

import pytest

from abyssal.parallel.watch_beat import Beat, Judge, Verdict
from abyssal.parallel.watch_failure import Failure
from abyssal.parallel.watch_slow import TIMES_IN_A_ROW, SlowRanks
from abyssal.parallel.watch_stack import is_waiting, main_thread_stack, main_thread_stands, raised_waiting

INTERVAL, TIMEOUT = 1.0, 10.0


class Watched:
    """Three ranks' beats under a judge, second by second."""

    def __init__(self) -> None:
        self.judge = Judge(INTERVAL, TIMEOUT)
        self.beats = {rank: Beat(0) for rank in range(3)}
        self.now = 0.0

    def second(self, *silent: int, passed: float = 1.0) -> Verdict | None:
        self.now += passed
        for rank, beat in self.beats.items():
            if rank not in silent:
                self.beats[rank] = replace(beat, number=beat.number + 1)
        return self.judge.see(self.now, self.beats)

    def until_verdict(self, *silent: int, most: int = 30) -> tuple[Verdict | None, float]:
        begin = self.now
        for _ in range(most):
            if (verdict := self.second(*silent)) is not None:
                return verdict, self.now - begin
        return None, self.now - begin


def test_ranks_that_speak_are_let_be() -> None:
    assert Watched().until_verdict() == (None, 30)


def test_a_silent_rank_is_found_in_time_for_the_others_to_hear() -> None:
    verdict, took = Watched().until_verdict(1)
    assert verdict is not None and (verdict.kind, verdict.rank) == ("silent", 1)
    assert TIMEOUT / 2 < took <= TIMEOUT - INTERVAL


def test_silence_ends_sooner_when_a_rank_has_lost_a_connection() -> None:
    watched = Watched()
    watched.beats[0] = replace(watched.beats[0], lost=True)
    verdict, took = watched.until_verdict(2)
    assert verdict is not None and verdict.rank == 2 and took < TIMEOUT - 3 * INTERVAL


def test_a_judge_that_did_not_run_itself_blames_nobody_for_it() -> None:
    watched = Watched()
    watched.second()
    assert watched.second(0, 1, 2, passed=1000.0) is None and watched.second() is None


def test_a_rank_that_has_left_is_not_silent() -> None:
    watched = Watched()
    watched.beats[2] = replace(watched.beats[2], left=True)
    assert watched.until_verdict(2) == (None, 30)


@pytest.mark.parametrize(
    ("stills", "waits", "patient", "found"),
    [
        ((9.0, 9.0, 9.0), (True, False, True), (), ("stands", 1)),
        ((9.0, 8.0, 8.5), (True, False, False), (), ("stands", 2)),
        ((9.0, 2.0, 9.0), (True, False, True), (), None),  # it moves
        ((9.0, 9.0, 9.0), (False, False, False), (), None),  # nobody waits for it
        ((9.0, 9.0, 9.0), (True, False, True), (1,), None),
        ((9.0, 9.0, 9.0), (True, True, True), (), ("deadlock", 0)),
        ((9.0, 9.0, 1.0), (True, True, True), (), None),
        ((9.0, 9.0, 9.0), (True, True, True), (0,), None),
    ],
)
def test_a_rank_that_stands_still_while_others_wait(
    stills: tuple[float, ...], waits: tuple[bool, ...], patient: tuple[int, ...], found: tuple[str, int] | None
) -> None:
    watched = Watched()
    for rank in watched.beats:
        watched.beats[rank] = Beat(0, still=stills[rank], waits=waits[rank], patient=rank in patient)
    verdict = watched.second()
    assert (None if verdict is None else (verdict.kind, verdict.rank)) == found


def _slow(*seconds: tuple[float, ...]) -> list[tuple[int, float]]:
    """Ranks named, and how many times the median, over steps of these own times by rank."""
    slow, beats = SlowRanks(), [Beat(0) for _ in seconds[0]]
    found = slow.see(beats)
    for times in seconds:
        beats = [
            replace(beat, steps=beat.steps + 1, step=beat.step + 1, own_seconds=beat.own_seconds + own)
            for beat, own in zip(beats, times, strict=True)
        ]
        found += slow.see(beats)
    return [(one.rank, round(one.times, 3)) for one in found]


def test_a_slow_rank_is_named_once_with_how_much() -> None:
    assert _slow(*[(0.1, 0.1, 0.2, 0.11)] * (TIMES_IN_A_ROW - 1)) == []
    assert _slow(*[(0.1, 0.1, 0.2, 0.11)] * (3 * TIMES_IN_A_ROW)) == [(2, 2.0)]
    assert _slow(*[(0.3, 0.1)] * TIMES_IN_A_ROW) == [(0, 3.0)]


def test_one_slow_step_and_noise_name_nobody() -> None:
    quick, once = (0.1, 0.1, 0.1), (0.1, 0.9, 0.1)
    assert _slow(*[quick, once] * 10) == []
    assert _slow(*[(0.1, 0.149, 0.1)] * 20) == []
    assert _slow(*[(0.001, 0.003, 0.001)] * 20) == []


def test_a_rank_is_named_again_after_it_had_been_as_fast() -> None:
    slow, quick = (0.1, 0.1, 0.3), (0.1, 0.1, 0.1)
    assert len(_slow(*[slow] * 6, quick, *[slow] * 6)) == 2


def test_a_message_names_rank_host_process_step_and_phase() -> None:
    failure = Failure("stands", 3, "node-b", 4711, 12, "validating", 57.2, '  File "a.py", line 1\n')
    assert Failure.from_json(failure.to_json()) == failure
    assert failure.message(0, 8) == (
        "rank 3 of 8 (node-b, pid 4711) made no progress for 57 s while others waited for it (step 12, validating); "
        'rank 0 ends with it\n  File "a.py", line 1'
    )
    assert "; it ends" in failure.message(3, 8)
    assert "last heard of at step 12" in replace(failure, kind="silent").message(0, 8)
    assert [replace(failure, kind=kind).exit_code for kind in ("problem", "interrupted", "ended")] == [2, 130, 1]


class Handle:
    """Waits like those of collectives."""

    def wait(self) -> int:
        return inspect.currentframe().f_back.f_lasti  # pyright: ignore[reportOptionalMemberAccess]

    work = wait


def _waits_in_a_call() -> int:
    handle = Handle()
    return handle.wait()


def _works_in_a_call() -> int:
    handle = Handle()
    return handle.work()


def test_a_wait_is_known_by_the_source_of_the_call() -> None:
    assert is_waiting(_waits_in_a_call.__code__, _waits_in_a_call())
    assert not is_waiting(_works_in_a_call.__code__, _works_in_a_call())


def test_where_an_exception_was_raised() -> None:
    class Broken:
        wait = staticmethod({}.__getitem__)

    caught: list[BaseException] = []
    try:
        Broken.wait("peer")
    except KeyError as error:
        caught.append(error)
    try:
        {}["peer"]
    except KeyError as error:
        caught.append(error)
    try:
        raise RuntimeError("micro-batch 3 did not come") from caught[0]
    except RuntimeError as error:
        caught.append(error)
    assert [raised_waiting(error) for error in caught] == [True, False, True]


def test_the_main_thread_is_seen_to_stand_still_and_to_move() -> None:
    places: list[int] = []

    def look() -> None:
        time.sleep(0.2)  # until the main thread waits for this one
        places.extend(main_thread_stands().place for _ in range(2))

    first, second = threading.Thread(target=look), threading.Thread(target=look)
    first.start()
    first.join(5)
    second.start()
    second.join(5)
    assert places[0] == places[1] != places[2] == places[3]
    assert "test_the_main_thread_is_seen" in main_thread_stack()
