"""``abyssal serve``: what it refuses with one line, and its life in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from abyssal.cli.main import main

if TYPE_CHECKING:
    from tests.support.trained_model import TrainedModel


@pytest.fixture(autouse=True)
def no_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own accounts are found; where they would be."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "abyssal" / "accounts.sqlite"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error."""
    assert main(["serve", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed.err
    return printed.err


def make_key(capsys: pytest.CaptureFixture[str], file: Path, name: str = "alice") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    assert main(["keys", "create", name, "--file", str(file), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["key"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: is no folder"),
        (["{folder}", "--port", "70000"], "--port is 70000"),
        (["{folder}", "--port", "0", "--host", "nowhere.invalid"], "--host: 'nowhere.invalid'"),
        (["{folder}", "--max-requests", "0"], "--max-requests is 0"),
        (["{folder}", "--port", "0", "--host", "0.0.0.0"], "no keys"),
        (["{folder}", "--cors-origin", "chat.example"], "--cors-origin: 'chat.example'"),
        (["{folder}", "--cors-origin", "*", "--cors-origin", "https://chat.example/"], "is no origin"),
        (["{folder}", "--open", "--keys", "x"], "contradict each other"),
        (["{folder}", "--keys", "{folder}/x"], "abyssal keys create"),
        (["{folder}", "--operator", "alice"], "--operator"),
        (["{folder}", "--prices", "{folder}/x"], "No such file"),
        (["{folder}", "--no-disk-cache", "--disk-cache-bytes", "5"], "contradict each other"),
        (["{folder}", "--port", "0"], "tokenizer.json"),
        (["{folder}", "--port", "0", "--route", "x"], "--route"),
        (["{folder}", "--prot", "1"], "abyssal serve --help"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, *(argument.format(folder=tmp_path) for argument in arguments))


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}: Address already in use" in refusal(capsys, str(tmp_path), "--port", port)


def test_prices_of_other_models_and_keys_of_nobody(
    tmp_path: Path, no_accounts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('[models."other"]\nhit = 1\nmiss = 1\noutput = 1\n')
    assert "no model 'mine'" in refusal(capsys, str(tmp_path), "--name", "mine", "--prices", str(prices))
    make_key(capsys, no_accounts)
    assert "no key named 'bob'" in refusal(capsys, str(tmp_path), "--operator", "bob")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and what it says when it is ready."""
    command = [sys.executable, "-m", "abyssal", "serve", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, line
    finally:
        process.kill()
        process.wait()


def test_it_serves_a_model_with_keys_until_a_signal(
    trained_model: TrainedModel, no_accounts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys in the usual place are found, and needed."""
    key = make_key(capsys, no_accounts)
    with serving(trained_model.folder, "--name", "tiny", "--no-disk-cache") as (process, line):
        assert line.startswith("tiny at http://127.0.0.1:") and line.endswith(" (with keys)\n")
        url = line.split()[2]
        asked = {"model": "tiny", "prompt": "def ", "max_tokens": 5, "temperature": 0}
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url) as client:
            assert client.get("/ready").json() == {"status": "ready"}
            assert client.get("/").headers["content-type"].startswith("text/html")
            assert client.post("/v1/completions", json=asked).status_code == 401
            assert client.get("/metrics").status_code == 401
            assert client.post("/debug/trace", headers=headers).status_code == 404
            answer = client.post("/v1/completions", json=asked, headers=headers).json()
            assert answer["usage"]["completion_tokens"] == 5
            assert "vllm:" in client.get("/metrics", headers=headers).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stdout is not None
        log = process.stderr.read()
        assert process.stdout.read() == ""
    assert "def " not in log and key not in log
    assert json.loads(log.splitlines()[-1])["level"] == "info"
    assert not _children_of(process.pid)


def test_a_model_that_cannot_be_loaded_is_one_line(trained_model: TrainedModel, tmp_path: Path) -> None:
    for file in trained_model.folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "abyssal", "serve", str(tmp_path), "--port", "0", "--no-disk-cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("abyssal serve: ")
    assert "safetensors" in done.stderr.splitlines()[-1]


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
