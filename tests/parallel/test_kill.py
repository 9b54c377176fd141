"""A run that loses a rank ends at once, and goes on from its last checkpoint as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.forked_ranks import RankStarter
from tests.support.killed_ranks import (
    SIGNALS,
    STEPS,
    assert_same_end,
    events,
    prepare,
    rank_pid,
    torchrun,
    train_options,
    wait_for_step,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for ranks in /proc")
TIMEOUT = 4.0
AGAIN = {rank: {"TORCHELASTIC_RESTART_COUNT": "1"} for rank in (0, 1)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def alone(rank_starter: RankStarter, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ends = rank_starter.start(2, "abyssal", *train_options(prepared, out, 30.0)).wait()
    assert [end.code for end in ends.values()] == [0, 0], ends
    return out


PIPELINE = "pp=2,dp=1"


@pytest.fixture(scope="module")
def pipeline_alone(rank_starter: RankStarter, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a pipeline."""
    out = tmp_path_factory.mktemp("pipeline-alone") / "run"
    ends = rank_starter.start(2, "abyssal", *train_options(prepared, out, 30.0, PIPELINE)).wait()
    assert [end.code for end in ends.values()] == [0, 0], ends
    return out


def _under_torchrun(prepared: Path, out: Path, name: str, rank: int, step: int, mesh: str = "dp=2,ep=2") -> str:
    """Lose a rank; torchrun starts both again, and they go on by themselves.  What was said."""
    launcher = torchrun(train_options(prepared, out, TIMEOUT, mesh), max_restarts=1)
    wait_for_step(out, step)
    saved = any(out.glob("checkpoints/step-*/state.json"))
    os.kill(rank_pid(launcher.pid, rank), SIGNALS[name])
    begin = time.monotonic()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    told = [line for line in errors.splitlines() if line.startswith("abyssal train: ")]
    assert len(told) == 1 and f"rank {rank} of 2 " in told[0] and f"rank {1 - rank} ends with it" in told[0], errors
    assert "Traceback" not in errors and time.monotonic() - begin < 60
    assert [event["event"] for event in events(out)].count("resume") == 1 or not saved
    return errors


@pytest.mark.slow
def test_a_rank_killed_under_torchrun(prepared: Path, alone: Path, tmp_path: Path) -> None:
    rank, step = random.randrange(2), random.randrange(3, STEPS // 2)
    _under_torchrun(prepared, tmp_path / "run", "SIGKILL", rank, step)
    assert_same_end(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_rank_of_a_pipeline_lost_in_mid_schedule(
    name: str, rank: int, prepared: Path, pipeline_alone: Path, tmp_path: Path
) -> None:
    errors = _under_torchrun(prepared, tmp_path / "run", name, rank, random.randrange(3, STEPS // 2), PIPELINE)
    if name == "SIGKILL":  # one that is stopped keeps its connections
        assert f"rank {1 - rank} was waiting: " in errors, errors
    assert_same_end(tmp_path / "run", pipeline_alone)


@pytest.mark.slow
def test_a_rank_stopped_and_both_started_again(
    rank_starter: RankStarter, prepared: Path, alone: Path, tmp_path: Path
) -> None:
    rank, step, out = random.randrange(2), random.randrange(3, STEPS // 2), tmp_path / "run"
    started = rank_starter.start(2, "abyssal", *train_options(prepared, out, TIMEOUT))
    wait_for_step(out, step)
    os.kill(started.pids[rank], signal.SIGSTOP)
    begin = time.monotonic()
    ends = started.wait()
    assert max(end.at for end in ends.values()) - begin < TIMEOUT + 1
    assert f"abyssal train: rank {rank} of 2 " in ends[1 - rank].errors
    assert "gave no sign of life" in ends[1 - rank].errors and ends[rank].code == -signal.SIGKILL
    options = train_options(prepared, out, 30.0)
    ends = rank_starter.start(2, "abyssal", *options, variables=AGAIN, store=started.store).wait()
    assert [end.code for end in ends.values()] == [0, 0], ends
    assert_same_end(out, alone)


@pytest.mark.slow
def test_a_rank_that_hangs_while_others_wait_for_its_tokens(
    rank_starter: RankStarter, prepared: Path, tmp_path: Path
) -> None:
    ends = rank_starter.start(2, "hung", *train_options(prepared, tmp_path / "run", TIMEOUT)).wait()
    assert [end.code for end in ends.values()] == [1, 1], ends
    for end in ends.values():
        assert end.errors.count("abyssal train: ") == 1 and "rank 1 of 2 " in end.errors, ends
        assert "made no progress" in end.errors and "(step 3, training)" in end.errors
        assert end.errors.rstrip().endswith("time.sleep(600)")


@pytest.mark.slow
def test_another_launchers_run_is_not_gone_on_with_unasked(
    rank_starter: RankStarter, prepared: Path, alone: Path
) -> None:
    """A restart after bad input must not take up a run that lay there before."""
    ends = rank_starter.start(2, "abyssal", *train_options(prepared, alone, 30.0), variables=AGAIN).wait()
    assert [end.code for end in ends.values()] == [2, 2] and "go on with --resume" in ends[0].errors


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [0, 1, 5, STEPS - 4])
def test_any_rank_lost_at_any_step_under_torchrun(
    name: str, rank: int, step: int, prepared: Path, alone: Path, tmp_path: Path
) -> None:
    _under_torchrun(prepared, tmp_path / "run", name, rank, step)
    assert_same_end(tmp_path / "run", alone)
