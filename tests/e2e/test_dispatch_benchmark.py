"""``benchmarks/dispatch.py`` on small sizes: what is counted is what the routing says, three times over."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dispatch_parts.expected import hierarchical_copies, plain_copies
from benchmarks.dispatch_parts.setting import Setting

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "dispatch.py"
SETTING = Setting(nodes=2, ranks_per_node=2, kept_nodes=2, tokens=128, hidden=512, experts=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What was saved, and what was printed; over namespaces where they are allowed, else held back in user space."""
    out = tmp_path_factory.mktemp("dispatch")
    sizes = ["--tokens", "128", "--hidden", "512", "--experts", "64", "--repeats", "1", "--gigabits", "0.2"]
    command = [sys.executable, str(BENCHMARK), "--layouts", "2x2", *sizes, "--results", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / "dispatch.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "dispatch.json").read_text(encoding="utf-8")), done.stdout


def test_bytes_counted_are_those_of_the_routing(run: tuple[dict[str, Any], str]) -> None:
    (case,) = run[0]["cases"]
    assert case["setting"] == SETTING.as_json()
    tokens = SETTING.tokens * SETTING.ranks
    ways = {row["way"]: row for row in case["rows"]}
    assert list(ways) == ["plain", "128", "64", "tuned"]
    for way, row in ways.items():
        copies = plain_copies(SETTING) if way == "plain" else hierarchical_copies(SETTING)
        expected = {"dispatch": copies.dispatch_bytes(SETTING), "combine": copies.combine_bytes(SETTING)}
        for phase, sizes in expected.items():
            assert row["counted"][phase] == {link: size / tokens for link, size in sizes.items()}, (way, phase)
            assert row["expected"][phase] == row["counted"][phase]
        across = sum(phase["across"] for phase in row["counted"].values())
        headers = (
            200  # and barriers, of some ten messages a phase over 512 tokens: a copy more of a token is 1540 bytes
        )
        assert across <= row["link_bytes"] < across + headers, way
    assert ways["tuned"]["copies_across"] <= 1 < 3 < ways["plain"]["copies_across"]
    assert ways["tuned"]["chunk_tokens"] in (128, 64)


def test_what_is_saved_is_what_was_printed(run: tuple[dict[str, Any], str]) -> None:
    data, printed = run
    (case,) = data["cases"]
    assert {"commit", "machine", "command", "torch", "load"} <= set(data)
    assert f"TCP gets {case['across']['gigabits']:.3f} across" in printed
    lines = printed.splitlines()
    for row in case["rows"]:
        size = "plain" if row["way"] == "plain" else f"hierarchical, {row['chunk_tokens']} tokens"
        if row["way"] == "tuned":
            size = size.replace(", ", ", tuned: ")
        bytes_line, times_line = (line.split() for line in lines if line.strip().startswith(size))
        assert bytes_line[-1] == f"{row['link_bytes']:,.0f}"
        assert times_line[-1] == f"{row['speedup']:.2f}x" and times_line[-2] == f"{row['share_of_link']:.0%}"
        assert all(time > 0 for times in row["milliseconds"].values() for time in times)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--layouts", "2"], "'2' is not like 2x2"),
        (["--layouts", "3x2"], "256 experts do not divide over 6 ranks"),
        (["--kept-nodes", "3"], "num_kept_groups is 3"),
        (["--gigabits", "0"], "must be above 0"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("dispatch").main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
