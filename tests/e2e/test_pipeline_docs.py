"""docs/pipeline.md: its commands run and print what it shows, its Python holds, its pictures are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from abyssal.cli.main import main
from abyssal.parallel.pipeline.schedule import SCHEDULES
from tests.support.readme import commands

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "pipeline.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"<!-- shown -->\n```console\n\$ abyssal (.*?)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [command.text for command in commands(PAGE) if command.marked]


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=pytest.mark.slow) if "--png pipeline-" in one else one for one in COMMANDS]
)
def test_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--png" in command:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()
    files = [word for word in arguments if word.endswith((".png", ".json"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_what_is_shown_is_what_is_printed(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_python_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/pipeline.md", "exec"), {})


def test_every_schedule_and_picture_is_there() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(SCHEDULES)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    drawn = [f"results/pipeline-{name}.png" for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")]
    assert pictures == [*drawn, "results/overlap.png"]
    assert all((DOCS / picture).is_file() for picture in pictures)
    assert len(SHOWN) == 2 and len(COMMANDS) == 7
