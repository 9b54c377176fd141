"""The command: its files, its options, its one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from abyssal.checkpoint.hf import load_model
from abyssal.cli.main import main
from tests.support.checkpoints import contents, saved


def test_the_command_converts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "in", "fp32")
    arguments = ["--dtype", "fp8", "--no-mtp", "--max-shard-bytes", "100000"]
    assert main(["convert", str(source), str(tmp_path / "out"), *arguments]) == 0
    out, err = capfd.readouterr()
    files = len(list((tmp_path / "out").glob("model-*.safetensors")))
    assert files > 1 and f"in {files} files, fp8" in out and err == ""  # no bar where standard error is no terminal
    assert load_model(tmp_path / "out").spec.mtp_depth == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--dtype", "fp8"], "nowhere: is not a folder"),
        (["in", "in", "--dtype", "fp8"], "in: exists"),
        (["in", "in/config.json/out", "--dtype", "fp8"], "a file is in its way"),
        (["in", "out"], "--dtype"),
        (["in", "out", "--dtype", "fp4"], "fp4"),
        (["in", "out", "--dtype", "fp8", "--max-shard-bytes", "0"], "max_shard_bytes is 0"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "in")
    before = contents(tmp_path)
    assert main(["convert", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("abyssal convert: ") and err.count("\n") == 1 and message in err
    assert contents(tmp_path) == before
