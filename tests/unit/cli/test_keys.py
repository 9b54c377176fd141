"""``abyssal keys``."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abyssal.cli.main import main
from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.refusal import Refusal
from abyssal.serve.accounts.store import Store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "accounts.sqlite"


def figures(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> dict[str, Any]:
    assert main(["keys", *arguments, "--file", str(file), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_life_of_a_key(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "1000", "--concurrency", "2")
    made = figures(capsys, file, "create", "alice", "--balance", "1.50", "--expires", "2", *limits)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (made["balance"], made["currency"], made["concurrency"]) == ("1.50", "USD", 2)
    with Store(file) as store:
        assert KeyRing(store).authenticate(made["key"]).key_name == "alice"
    assert figures(capsys, file, "topup", "alice", "0.000000012")["balance"] == "1.500000012"
    assert figures(capsys, file, "topup", "alice", "-0.5", "--reference", "p")["balance"] == "1.000000012"
    assert figures(capsys, file, "topup", "alice", "-0.5", "--reference", "p")["repeated"]
    listed = figures(capsys, file, "list")
    assert [key["name"] for key in listed["keys"]] == ["alice"]
    assert listed["keys"][0]["balance"] == "1.000000012" and made["key"] not in json.dumps(listed)
    assert figures(capsys, file, "disable", "alice")["disabled"]
    with Store(file) as store, pytest.raises(Refusal):
        KeyRing(store).authenticate(made["key"])
    assert not figures(capsys, file, "enable", "alice")["disabled"]


def test_as_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--file", str(file))
    assert main(["keys", "create", "alice", "--postpaid", "--expires", "2100-01-31", *where]) == 0
    output = capsys.readouterr()
    with Store(file) as store:  # standard output is the key and nothing else, for scripts
        assert KeyRing(store).authenticate(output.out.removesuffix("\n")).postpaid
    assert "not shown again" in output.err
    for arguments, text in (
        (("create", "bob", "--account", "alice", "--concurrency", "3"), "sk-"),
        (("topup", "bob", "5"), "alice: added 5.00; the balance is 5.00 USD"),
        (("disable", "bob"), "bob is disabled"),
        (("list",), "alice: 5.00 USD, postpaid, disabled, concurrency: 3"),
        (("list",), "postpaid, expires 2100-01-31 00:00"),
        (("enable", "bob"), "bob is enabled"),
    ):
        assert main(["keys", *arguments, *where]) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["remove"],
        ["create"],
        ["create", "alice"],
        ["create", "new", "--balance", "-1"],
        ["create", "new", "--balance", "much"],
        ["create", "new", "--concurrency", "0"],
        ["create", "new", "--concurrency", "many"],
        ["create", "new", "--expires", "soon"],
        ["create", "new", "--expires", "nan"],
        ["create", "new", "--expires", "1e300"],
        ["create", "new", "--expires", "2001-01-01"],
        ["create", "new", "--currency", "EUR"],
        ["create", "new", "--currency", "euro"],
        ["topup", "alice"],
        ["topup", "alice", "nothing"],
        ["topup", "bob", "1"],
        ["disable", "bob"],
        ["list", "--file", "/nowhere/accounts.sqlite"],
        ["list", "--file", "/"],
    ],
)
def test_bad_input_is_one_line(file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    figures(capsys, file, "create", "alice")
    where = [] if "--file" in arguments or len(arguments) < 2 else ["--file", str(file)]
    assert main(["keys", *arguments, *where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("abyssal keys: ") and error.count("\n") == 1
    assert len(figures(capsys, file, "list")["keys"]) == 1


def test_it_starts_without_torch() -> None:
    program = "import sys, abyssal.cli.keys; sys.exit(bool({'torch', 'tyro', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
