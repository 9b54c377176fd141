"""Ranks that do not come, or differ, are told before any work."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.support.forked_ranks import RankStarter

SOON = {"ARRIVAL": "1"}


def test_a_rank_that_never_starts_is_named(rank_starter: RankStarter) -> None:
    ends = rank_starter.start(3, "watched", "3", "2", ranks=[0, 2], variables=dict.fromkeys((0, 2), SOON)).wait()
    assert [end.code for end in ends.values()] == [2, 2] and ends[2].errors == ""
    assert "rank 1 of 3 did not come to 127.0.0.1:" in ends[0].errors
    assert "ranks 0, 2 did" in ends[0].errors and "--rank-timeout" in ends[0].errors


def test_without_the_first_rank_another_speaks(rank_starter: RankStarter) -> None:
    ends = rank_starter.start(3, "watched", "3", "2", ranks=[1, 2], variables=dict.fromkeys((1, 2), SOON)).wait()
    assert "rank 0 of 3 did not come" in ends[1].errors and ends[2].errors == ""


def test_a_store_that_is_not_there_is_named_with_its_address(rank_starter: RankStarter) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"ARRIVAL": "1", "MASTER_PORT": port}
    ends = rank_starter.start(2, "watched", "3", "2", ranks=[1], variables={1: variables}).wait()
    assert ends[1].code == 2 and f"rank 1 of 2 cannot reach the ranks' store at 127.0.0.1:{port}" in ends[1].errors
    assert "MASTER_ADDR" in ends[1].errors and len(ends[1].errors.strip().splitlines()) == 1


def test_the_first_difference_is_named_with_ranks_and_values(rank_starter: RankStarter) -> None:
    ends = rank_starter.start(3, "watched", "3", "2", variables={1: {"SEED": "7"}}).wait()
    assert [end.code for end in ends.values()] == [2, 2, 2]
    assert "ranks differ in option.seed: ranks 0, 2 (" in ends[0].errors and '"0"; rank 1 (' in ends[0].errors
    assert 'has "7"' in ends[0].errors and ends[1].errors == ends[2].errors == ""


def test_bad_input_is_one_line_of_the_first_rank(rank_starter: RankStarter, tmp_path: Path) -> None:
    out, missing = str(tmp_path / "run"), str(tmp_path / "nowhere.txt")
    for arguments, problem in (
        (["--data", missing], f"abyssal train: {missing}: no such file or folder"),
        (["--steps", "many"], "many"),
        (["--mesh", "dp=3"], "mesh dp=3,ep=1 is of 3 ranks and there are 2"),
        (["--mesh", "pp=2"], "mesh pp is 2, but micro_batch_size is not set"),
        (["--mesh", "dp=2,ep=2", "--redundant-experts", "1"], "redundant_experts is 1"),
        (["--batch-size", "3"], "batch_size is 3"),
    ):
        ends = rank_starter.start(2, "abyssal", "train", "--out", out, *arguments).wait()
        assert [end.code for end in ends.values()] == [2, 2], (arguments, ends)
        assert problem in ends[0].errors and ends[0].errors.count("\n") == 1 and ends[1].errors == "", (problem, ends)
        assert not Path(out).exists()
