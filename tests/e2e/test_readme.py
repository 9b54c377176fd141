"""Every command that the README shows works as shown."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.readme import Command, commands

README = Path(__file__).parents[2] / "README.md"
COMMANDS = commands(README.read_text(encoding="utf-8"))

TRAINED = "needs a text and minutes of training; tests/e2e/test_train.py runs the verb on a small text"
NOT_RUN_HERE: dict[str, str] = {
    "abyssal train --model tiny --data my-texts/ --out runs/mine --steps 1000": TRAINED,
    'abyssal generate runs/mine/model --prompt "Once upon a time" --temperature 0.8': TRAINED,
    "abyssal chat runs/chat/model": "needs a model that can talk, and a terminal; tests/e2e/test_chat.py has both",
    "abyssal serve runs/chat/model": "runs until it is told to end; tests/e2e/serve asks it as clients do",
    "abyssal convert DeepSeek-V3/ DeepSeek-V3-bf16/ --dtype bf16": "needs DeepSeek-V3's checkpoint; "
    "tests/unit/checkpoint/test_convert.py runs the verb on small ones",
}
"""Commands that no test here runs, each with the reason and the test that covers it instead."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Commands run in one folder in the README's order, so that one may use what another wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)
def test_command_runs(command: Command, folder: Path):
    if command.text in NOT_RUN_HERE:
        pytest.skip(NOT_RUN_HERE[command.text])
    assert command.marked, f"`{command.text}`: mark its block <!-- run -->, or name it in NOT_RUN_HERE with the reason"
    arguments = shlex.split(command.text)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "abyssal", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "the command printed nothing"


def test_what_is_not_run_is_still_in_the_readme():
    assert set(NOT_RUN_HERE) <= {command.text for command in COMMANDS}


def test_commands_are_found_in_blocks_alone():
    page = "abyssal no\n<!-- run -->\n```bash\nabyssal info \\\n  tiny  # a note\n$ abyssal x\nmake y\n```\n"
    page += "```\nabyssal heavy\n```\n"
    found = [Command("abyssal info tiny", True), Command("abyssal x", True), Command("abyssal heavy", False)]
    assert commands(page) == found


def test_a_mark_without_a_block_is_an_error():
    with pytest.raises(ValueError, match="not followed"):
        commands("<!-- run -->\ntext\n```\nabyssal info\n```\n")
