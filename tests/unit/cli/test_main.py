"""The command itself: its help, its verbs, and how errors leave it."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

import abyssal
from abyssal.cli import main as command
from abyssal.cli.arguments import parse
from abyssal.cli.main import VERBS, main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_with_a_line(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, summary in VERBS.items():
        assert sum(line.split() == [verb, *summary.split()] for line in lines) == 1


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"abyssal {abyssal.__version__}\n"


def test_an_unknown_verb_is_one_line_and_status_2(capsys):
    assert main(["inform"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "'inform'" in captured.err and "info, " in captured.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a field\n  is wrong"), 2, "abyssal info: a field is wrong\n"),
        (FileNotFoundError("x.json: no such file"), 2, "abyssal info: x.json: no such file\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "abyssal info: No space left on device\n"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "abyssal info: runs/x: Read-only file system\n"),
        (KeyboardInterrupt(), 130, "abyssal info: interrupted\n"),
    ],
)
def test_errors_of_a_verb(error, status, line, monkeypatch, capsys):
    def verb(argv: list[str]) -> int:
        assert argv == ["a", "--b"]
        raise error

    monkeypatch.setattr(command, "_verb", lambda name: verb)
    assert main(["info", "a", "--b"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["info", "tiny"], ["info", "tiny", "--json"]])
def test_output_without_room_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "abyssal", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(": No space left on device\n") and done.stderr.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def verb(argv: list[str]) -> int:
        raise AssertionError("an invariant")

    monkeypatch.setattr(command, "_verb", lambda name: verb)
    with pytest.raises(AssertionError, match="an invariant"):
        main(["info"])


def test_the_status_of_a_verb_is_passed_on(monkeypatch):
    monkeypatch.setattr(command, "_verb", lambda name: lambda argv: 1)
    assert main(["info"]) == 1


@dataclass(frozen=True)
class _Options:
    """What a verb takes."""

    source: tyro.conf.Positional[str]
    """Where from."""
    steps: int = 3
    """How many."""


def test_options_become_a_dataclass():
    assert parse(_Options, ["x", "--steps", "4"], "try") == _Options("x", 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "source|SOURCE|STR"),
        (["x", "--steps", "q"], "'q'"),
        (["x", "--stepz", "4"], "--stepz"),
        (["x", "y"], "y"),
    ],
)
def test_errors_of_options_are_one_line(arguments, named, capsys):
    with pytest.raises(ValueError, match=named) as raised:
        parse(_Options, arguments, "try")
    message = str(raised.value)
    assert "\n" not in message and message.endswith("; see abyssal try --help")
    assert not set(message) & set("╭│─╰")
    assert capsys.readouterr().err == ""


def test_help_of_a_verb_comes_from_its_dataclass(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(_Options, ["--help"], "try")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert "abyssal try" in shown and "How many." in shown and "What a verb takes." in shown
