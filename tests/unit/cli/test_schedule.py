"""``abyssal schedule``: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abyssal.cli.main import main
from abyssal.parallel.pipeline.schedule import SCHEDULES, schedule


def run(*arguments: str) -> int:
    return main(["schedule", *arguments])


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_the_drawing_and_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dualpipe", "--ranks", "8", "--micro-batches", "20") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "rank 0  FFFFFFFfiwfiwfiwfF+b...f+BF+bf+BF+bf+Bb-.f+Bb-.f+Bb-.f+Bb-IWIWIWIW\n" in printed
    assert "capitals: from rank 0 up; small: from rank 7 down" in printed
    words = " ".join(printed.split())
    assert "time 66, bubble 6 (9.1%); closed form (P/2-1)(F&B+B-3W) = 6; a rank holds 2 of 8 stages" in words
    assert "activations of up to 9 chunks" in words


@pytest.mark.parametrize("width", ["40", "80", "133"])
def test_the_drawing_fits_the_terminal_in_colours_too(
    width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert run("1f1b", "--ranks", "4", "--micro-batches", "30") == 0
    plain = capsys.readouterr().out
    assert all(len(line) <= int(width) for line in plain.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert run("1f1b", "--ranks", "4", "--micro-batches", "30") == 0
    assert "\x1b[" in capsys.readouterr().out


def test_json_holds_every_figure_and_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "4", "--micro-batches", "8", "--forward", "2", "--pair", "4", "--json"]
    assert run("dualpipe", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    made = schedule("dualpipe", 4, 8)
    assert (printed["schedule"], printed["ranks"], printed["micro_batches"], printed["stages"]) == ("dualpipe", 4, 8, 4)
    assert printed["chunks"] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert (printed["parameters"], printed["activations"], printed["activations_bound"]) == (2, [5, 5, 5, 5], 5)
    assert (printed["bubble_closed_form"], printed["bubble_formula"]) == (3, "(P/2-1)(F&B+B-3W)")
    for actions, expected in zip(printed["actions"], made.actions, strict=True):
        kinds = [tuple(work["kind"] for work in action["works"]) for action in actions]
        assert kinds == [tuple(work.kind for work in action.works) for action in expected]
        assert max(action["end"] for action in actions) <= printed["makespan"]
    first = printed["actions"][0][0]
    assert first == {
        "works": [{"kind": "F", "chunk": 0, "stage": 0, "micro_batch": 0}],
        "start": 0,
        "end": 2,
    }


def test_all_schedules_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one model: DualPipeV's stages are half as large."""
    assert run("all", "--ranks", "8", "--micro-batches", "20", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == list(SCHEDULES)
    assert {name: (row["makespan"], row["bubble"]) for name, row in rows.items()} == {
        "gpipe": (81, 21),
        "1f1b": (81, 21),
        "zb1p": (67, 7),
        "dualpipe": (66, 6),
        "dualpipev": (67, 7),
    }
    assert all(row["bubble"] == row["bubble_closed_form"] for row in rows.values())
    assert run("all", "--ranks", "5", "--micro-batches", "8") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "zb1p 28 4 (P-1)(F+B-2W) = 4 1/5 5/5 dualpipe - - - - - dualpipev" in printed
    assert "dualpipev for 8 micro-batches on 5 ranks: it needs at least two a rank; give 10 or more" in printed


def test_pictures_and_traces_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"one.{ending}" for name, ending in (("png", "png"), ("svg", "svg"), ("trace", "json"))}
    arguments = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert run("zb1p", "--ranks", "2", "--micro-batches", "3", *arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"wrote {path}\n" in printed for path in files.values())
    assert files["png"].read_bytes().startswith(b"\x89PNG") and b"<svg" in files["svg"].read_bytes()
    assert json.loads(files["trace"].read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("dualpipe --ranks 3 --micro-batches 8", "needs an even number of ranks"),
        ("dualpipe --ranks 4 --micro-batches 6", "give an even number, 8 or more"),
        ("dualpope --ranks 4 --micro-batches 8", "choose one of gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("gpipe --ranks 0 --micro-batches 8", "0 ranks; give 1 or more"),
        ("gpipe --micro-batches 8", "--ranks"),
        ("gpipe --ranks two --micro-batches 8", "--ranks"),
        ("gpipe --ranks 2 --micro-batches 8 --forward nan", "--forward is nan; give a time of 0 or more"),
        ("gpipe --ranks 2 --micro-batches 8 --send -1", "--send is -1.0; give a time of 0 or more"),
        ("gpipe --ranks 2 --micro-batches 8 --forward 0 --input 0 --weight 0", "all 0; give one of them some time"),
        ("gpipe --ranks 2 --micro-batches 8 --png one.jpg", "--png is one.jpg; give a file that ends in .png"),
        ("gpipe --ranks 2 --micro-batches 8 --trace no/such/folder.json", "No such file"),
        ("gpipe --ranks 9999 --micro-batches 9999", "give fewer"),
        ("all --ranks 2 --micro-batches 8 --png one.png", "name one"),
    ],
)
def test_bad_input_is_one_line(arguments: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments.split()) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("abyssal schedule: ") and caught.err.count("\n") == 1 and problem in caught.err
