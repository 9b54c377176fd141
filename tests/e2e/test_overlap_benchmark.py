"""``benchmarks/overlap.py --smoke``: the three ways compute the same, and what is saved is what was measured."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abyssal.parallel.pipeline.interleaving import BACKWARD_ROW, FORWARD_ROW
from benchmarks.overlap_parts.setting import Setting
from benchmarks.overlap_parts.trace import one_at_a_time

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "overlap.py"
GIGABITS = 0.02


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was saved, and the events of the trace; held back in user space, so that it needs no root."""
    out = tmp_path_factory.mktemp("overlap")
    options = ["--smoke", "--repeats", "1", "--links", "limiter", "--gigabits", str(GIGABITS)]
    command = [sys.executable, str(BENCHMARK), *options, "--results", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / "overlap.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads(gzip.decompress((out / "overlap-trace.json.gz").read_bytes()))
    return json.loads((out / "overlap.json").read_text(encoding="utf-8")), trace["traceEvents"]


def test_bytes_are_those_of_the_choices(run: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    found = run[0]["overlap"]
    setting = Setting(**found["setting"])
    crossing = setting.tokens * setting.top_k // 2 * setting.layers * setting.micro_batches
    # Four ways of a row, of which two have its weight beside it; and a few counts of rows.
    sent = crossing * (4 * 4 * setting.hidden + 2 * 4)
    assert sent <= found["step_bytes"] <= 1.02 * sent


def test_communication_takes_at_least_its_time_on_the_link(run: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    found = run[0]["overlap"]
    link = found["step_bytes"] * 8 / (GIGABITS * 1e9)
    assert found["communicating"][0] >= 0.99 * link
    assert found["seconds"]["serial"][0] >= found["communicating"][0]
    assert found["seconds"]["overlapped"][0] >= 0.99 * link, "a link does not carry more for being hidden"
    assert found["ratio"] == found["communicating"][0] / found["seconds"]["none"][0]
    serial, overlapped, none = (found["seconds"][way][0] for way in ("serial", "overlapped", "none"))
    assert found["hidden_of_step"] == pytest.approx((serial - overlapped) / (serial - none))
    assert set(found["waits"]) == {
        f"{side} {move}"
        for side, row in (("F", FORWARD_ROW), ("B", BACKWARD_ROW))
        for move in row
        if move.verb == "wait"
    }
    assert all(0 <= seconds <= overlapped for seconds in found["waits"].values())


def test_the_trace_has_every_move_once_and_one_message_at_a_time(
    run: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    data, events = run
    setting = Setting(**data["overlap"]["setting"])
    pairs = 2 * setting.micro_batches - 3
    for rank in (0, 1):
        tracks = [[one for one in events if one["ph"] == "X" and (one["pid"], one["tid"]) == (rank, track)]
                  for track in range(3)]  # fmt: skip
        assert sum(one["name"].startswith("pair") for one in tracks[0]) == pairs
        moves = len(FORWARD_ROW) + len(BACKWARD_ROW) + 4
        assert len(tracks[1]) == pairs * moves * setting.layers // 2
        assert len(tracks[2]) == 4 * setting.layers * setting.micro_batches
        for track in tracks[1:]:
            ordered = sorted(track, key=lambda one: one["ts"])
            assert all(one["ts"] + one["dur"] <= after["ts"] + 2 for one, after in itertools.pairwise(ordered))


def test_what_waited_on_its_lane_is_drawn_behind_what_was_before_it() -> None:
    sent = [("second", 1.0, 4.0), ("first", 0.0, 3.0), ("third", 5.0, 6.0)]
    assert one_at_a_time(sent) == [("first", 0.0, 3.0), ("second", 3.0, 4.0), ("third", 5.0, 6.0)]


def test_ranks_that_sleep_take_no_less_than_the_simulator(run: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    slept = run[0]["sleeping"]
    assert [one["name"] for one in slept] == ["1f1b", "zb1p", "dualpipe"]
    assert all(min(one["executor"]) >= one["simulator"] for one in slept)
    assert min(*run[0]["overhead"]["plain"], *run[0]["overhead"]["executor"]) > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ratio", "2"], "--ratio is 2.0; give 0.8 to 1.2"),
        (["--gigabits", "0"], "must be above 0"),
        (["--layers", "3"], "3 layers"),
        (["--micro-batches", "1"], "leave no pair"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("overlap").main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
