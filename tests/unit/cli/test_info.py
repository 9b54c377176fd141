"""``abyssal info``: its JSON, its table, and that it never waits for torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import abyssal
from abyssal.cli.info import scaled
from abyssal.cli.main import main
from abyssal.spec import arithmetic
from abyssal.spec.hf_config import write_config
from abyssal.spec.presets import PRESETS, preset

SOURCE = str(Path(abyssal.__file__).parents[1])
TORCH_FREE = """
import sys
from importlib import import_module
from pathlib import Path
import abyssal.spec
for path in Path(abyssal.spec.__file__).parent.glob("*.py"):
    import_module("abyssal.spec." + path.stem)
from abyssal.cli.main import main
status = main(["info", "deepseek-v3", *sys.argv[1:]])
heavy = sorted({"torch", "numpy", "transformers", "tyro"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else status)
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("options", [["--json"], []])
def test_neither_spec_nor_info_loads_torch(options):
    done = _python("-c", TORCH_FREE, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "671" in done.stdout


def test_info_answers_within_half_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        done = _python("-m", "abyssal", "info", "deepseek-v3", "--json")
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_a_reader_that_stops_early_is_no_error():
    environment = os.environ | {"PYTHONPATH": SOURCE}
    command = [sys.executable, "-m", "abyssal", "info", "deepseek-v3", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["info", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_json_of_deepseek_v3(capsys):
    figures = _json(capsys, "deepseek-v3")
    spec = preset("deepseek-v3")
    assert figures["total_parameters"] == spec.total_parameters
    assert figures["active_parameters"] == spec.active_parameters
    assert figures["mtp_parameters"] == spec.mtp_parameters
    assert figures["kv_cache_bytes_per_token"] == 70272
    assert figures["training_flops_per_token"] == spec.training_flops_per_token(4096)
    assert sum(figures["parameters_by_part"].values()) == figures["total_parameters"]
    assert figures["weight_bytes"]["fp32"] == 4 * figures["total_parameters"]


def test_json_at_another_length(capsys):
    figures = _json(capsys, "deepseek-v3", "--seq-len", "100")
    assert figures["seq_len"] == 100
    assert figures["training_flops_per_token"] == preset("deepseek-v3").training_flops_per_token(100)


def test_a_folder_and_its_file_say_what_the_preset_says(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(preset("small"), quantization="fp8")))
    named = _json(capsys, "small")
    for path in (tmp_path, tmp_path / "config.json"):
        assert _json(capsys, str(path)) == named | {"model": str(path)}


def test_a_short_model_is_measured_at_its_own_length(capsys, tmp_path):
    config = write_config(preset("tiny")) | {"max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _json(capsys, str(tmp_path))["seq_len"] == 128


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_fits_eighty_columns_and_lines_up(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", name]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(len(line) for line in lines) <= 80
    spec = preset(name)
    text = "\n".join(lines)
    assert f"total{' ' * 9}" in text and scaled(spec.total_parameters) in text
    assert f"{spec.kv_cache_bytes_per_token:,} B" in text
    head = next(index for index, line in enumerate(lines) if line.startswith("parameters  "))
    total = next(index for index, line in enumerate(lines) if line.startswith("total  "))
    rows = [line for line in (lines[head], *lines[head + 2 : total + 1]) if line]
    assert len(rows) == 2 + len(arithmetic.parameters_by_part(spec))
    assert len({len(row) for row in rows}) == 1  # every row ends where its header ends
    # One label a line: nothing was wrapped.
    assert all(re.match(r"\S", line) for line in lines if line)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nope"], "nope is neither a file or folder nor a preset"),
        ([], "the following arguments are required: MODEL"),
        (["tiny", "--seq-len", "x"], "argument --seq-len: invalid int value: 'x'"),
        (["tiny", "--seq-len", "0"], "--seq-len is 0: tiny takes 1 to 8192 positions"),
        (["tiny", "--seq-len", "8193"], "--seq-len is 8193"),
        (["tiny", "--jason"], "unrecognized arguments: --jason"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, named, capsys):
    assert main(["info", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("abyssal info: ") and captured.err.count("\n") == 1
    assert named in captured.err


def test_a_bad_configuration_is_named_with_its_file_and_field(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(preset("tiny")) | {"sliding_window": 64}))
    assert main(["info", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "config.json") in error and "sliding_window is 64" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (671026419200, "", "671.03B"),
        (12, "", "12"),
        (999_994_999, "", "999.99M"),
        (999_996_000, "", "1.00B"),
        (70272, "B", "70.27 kB"),
        (250449887232, "FLOPs", "250.45 GFLOPs"),
        (5, "B", "5 B"),
    ],
)
def test_figures_are_scaled(value, unit, shown):
    assert scaled(value, unit) == shown
