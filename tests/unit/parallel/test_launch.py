"""What a launcher says, and how ranks agree through a store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from abyssal.parallel.launch import Launch
from abyssal.parallel.launch_meeting import Meeting, OwnProblem, Peer, RankProblem, describe, listed_ranks
from abyssal.parallel.startup import check_shared_folder, compare_ranks, first_difference, source_digests

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1234"}
TORCHRUN |= {"MASTER_ADDR": "node-a", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_the_environment_of_torchrun() -> None:
    launch = Launch.from_environment(TORCHRUN)
    assert launch == Launch(3, 8, 1, 2, "node-a", 1234, restarts=2, launcher_has_store=True)
    assert launch is not None and not launch.is_first and Launch.from_environment({}) is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(changed: dict[str, str | None], told: str) -> None:
    variables = {name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=told):
        Launch.from_environment(variables)


def _meet(world_size: int, work: Callable[[Meeting], Any], absent: tuple[int, ...] = ()) -> list[Any]:
    """What ``work`` returns or raises on each rank, which are threads."""
    store, found = distributed.HashStore(), [None] * world_size

    def attend(rank: int) -> None:
        try:
            found[rank] = work(Meeting(store, rank, world_size))  # pyright: ignore[reportArgumentType]
        except Exception as error:
            found[rank] = error  # pyright: ignore[reportCallIssue, reportArgumentType]

    threads = [threading.Thread(target=attend, args=(rank,)) for rank in range(world_size) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return found


def _peer(rank: int) -> Peer:
    return Peer(rank, f"node-{rank // 2}", 100 + rank, "machine")


def test_all_come_and_know_one_another() -> None:
    found = _meet(3, lambda meeting: meeting.roll_call(_peer(meeting.rank), 5.0, "here"))
    assert found == [[_peer(0), _peer(1), _peer(2)]] * 3


def test_a_roll_call_names_those_who_do_not_come() -> None:
    found = _meet(6, lambda meeting: meeting.roll_call(_peer(meeting.rank), 0.1, "node-0:1234"), absent=(2, 3, 5))
    told = "ranks 2-3, 5 of 6 did not come to node-0:1234 within 0.1 s, ranks 0-1, 4 did"
    assert all(told in str(found[rank]) for rank in (0, 1, 4))
    assert [isinstance(found[rank], OwnProblem) for rank in (0, 1, 4)] == [True, False, False]


def test_a_rank_that_cannot_begin_says_why() -> None:
    def come(meeting: Meeting) -> None:
        if meeting.rank == 1:
            meeting.cannot_begin("rank 1 (node-0): no such file")
        else:
            meeting.roll_call(_peer(meeting.rank), 5.0, "here")

    found = _meet(3, come)
    assert all(type(found[rank]) is RankProblem and str(found[rank]).endswith("no such file") for rank in (0, 2))


def test_the_first_alone_works_and_all_have_what_it_found() -> None:
    calls: list[int] = []

    def work(meeting: Meeting) -> list[Any]:
        return [meeting.first(lambda: calls.append(meeting.rank) or [meeting.rank, "done"]), meeting.first(lambda: 2)]

    assert _meet(3, work) == [[[0, "done"], 2]] * 3 and calls == [0]


def test_a_problem_of_the_first_is_everybodys() -> None:
    def work(meeting: Meeting) -> None:
        meeting.first(lambda: Path("/nowhere/at/all").read_text())

    found = _meet(3, work)
    assert isinstance(found[0], FileNotFoundError)
    assert all(isinstance(error, RankProblem) for error in found[1:])
    assert {str(error) for error in found[1:]} == {"/nowhere/at/all: No such file or directory"} == {describe(found[0])}


@pytest.mark.parametrize("failing", [(), (0, 1, 2), (1,), (1, 2)])
def test_together_all_do_well_or_all_fail_alike(failing: tuple[int, ...]) -> None:
    def work(meeting: Meeting) -> int:
        def own() -> int:
            if meeting.rank in failing:
                raise ValueError(f"no room on {meeting.rank}")
            return meeting.rank

        return meeting.together(own)

    found = _meet(3, work)
    if not failing:
        assert found == [0, 1, 2]
    else:
        told = "no room on 0" if 0 in failing else "rank 1: no room on 1"
        assert {str(error) for error in found} == {told}
        assert [type(error) for error in found[1:]] == [RankProblem, RankProblem]


def test_a_bug_is_not_taken_for_a_problem() -> None:
    def work(meeting: Meeting) -> None:
        meeting.first(lambda: {}["missing"]) if meeting.rank == 0 else None

    assert isinstance(_meet(2, work)[0], KeyError)


def _compared(meeting: Meeting, facts: dict[str, Any]) -> None:
    compare_ranks(meeting, facts, [_peer(rank) for rank in range(meeting.world_size)])


def test_ranks_that_are_alike_pass() -> None:
    assert _meet(3, lambda meeting: _compared(meeting, {"a": {"b": 1}, "c": [1, 2]})) == [None] * 3


def test_the_first_difference_is_named_on_every_rank() -> None:
    found = _meet(4, lambda meeting: _compared(meeting, {"same": 1, "option": {"seed": 5 if meeting.rank == 2 else 3}}))
    assert {str(error) for error in found} == {
        "ranks differ in option.seed: ranks 0-1, 3 (node-0, node-1) have 3; rank 2 (node-1) has 5; start all of them "
        "alike"
    }


def test_what_one_rank_lacks_is_a_difference() -> None:
    peers = [_peer(0), _peer(1)]
    message = first_difference([{"source file": {"a.py": "1"}}, {"source file": {"a.py": "1", "b.py": "2"}}], peers)
    assert message.startswith("ranks differ in source file.b.py: rank 0 (node-0) has nothing; rank 1 (node-0) has")


def test_source_files_and_native_libraries_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, text in {"a.py": "1", "inner/b.py": "2", "c.so": "3", "notes.txt": "4"}.items():
        (tmp_path / name).write_text(text)
    before = source_digests(tmp_path)
    (tmp_path / "inner/b.py").write_text("22")
    after = source_digests(tmp_path)
    assert list(before) == ["a.py", "c.so", "inner/b.py"]
    assert [name for name in before if before[name] != after[name]] == ["inner/b.py"]


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abyssal.parallel.startup.FILE_SECONDS", 0.2)
    found = _meet(2, lambda meeting: check_shared_folder(meeting, tmp_path / "shared" / "run"))
    assert found == [None, None] and list((tmp_path / "shared" / "run").iterdir()) == []
    found = _meet(2, lambda meeting: check_shared_folder(meeting, tmp_path / f"of-{meeting.rank}" / "run"))
    assert all("rank 1: " in str(error) and "does not see there what rank 0 wrote" in str(error) for error in found)
    assert not (tmp_path / "of-0").exists()


def test_ranks_are_listed_in_runs() -> None:
    assert [listed_ranks(ranks) for ranks in ([], [4], [0, 1, 2, 5])] == ["no rank", "rank 4", "ranks 0-2, 5"]
