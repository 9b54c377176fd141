"""What the pages show works: their Python runs, and the options of their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.cli import chat, convert, doctor, generate, keys, prepare, report, serve, sft, train
from abyssal.cli.arguments import parse
from tests.support.readme import commands
from tests.support.trained_model import TrainedModel

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/how-to.md", "docs/serving.md", "docs/fp8.md")
SERVER = "docs/server.md"
"""Its Python needs a server, as the tests in tests/e2e/serve do."""
OPTIONS: dict[str, type[Any]] = {
    "prepare": prepare.Options,
    "train": train.Options,
    "sft": sft.Options,
    "generate": generate.Options,
    "chat": chat.Options,
    "convert": convert.Options,
    "report": report.Options,
    "serve": serve.Options,
}
"""Verbs whose commands take long; the others are run by ``test_readme.py``."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


COMMANDS = [(page, command.text) for page in (*PAGES, SERVER) for command in commands(text_of(page))]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {text}" for page, text in COMMANDS])
def test_options_of_a_command_exist(page: str, command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    if verb in OPTIONS:
        parse(OPTIONS[verb], arguments, verb)
    elif verb == "keys":
        keys._parser().parse_args(arguments)
    elif verb == "doctor":
        doctor._parser().parse_args(arguments)
    else:
        assert page == "README.md", f"{command}: only the README's commands are run; add the verb to OPTIONS"


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(
    page: str, trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block after another, in a folder where the model that the page trains lies at its place."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model").symlink_to(trained_model.folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {"tokens_BS": torch.tensor([[0, 17, 42]])}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if "logits_BSV" in names:
        assert names["logits_BSV"].shape == (1, 3, trained_model.model.spec.vocab_size)
