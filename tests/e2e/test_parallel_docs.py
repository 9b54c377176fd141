"""docs/parallel.md: its tables are what its own programs and saved data give, its commands are ones that torchrun and
``abyssal`` take, and its messages are ones that the code has."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abyssal.cli import train
from abyssal.cli.arguments import parse
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.presets import preset
from abyssal.train.config import ParallelConfig, TrainConfig
from abyssal.train.loop import build_model
from abyssal.train.ranks import expert_share

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """What the page's Python defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/parallel.md", "exec"), names)
    return names


def table(mark: str) -> list[list[str]]:
    """Cells of the rows of the table after a comment that begins with ``mark``."""
    found = re.search(rf"<!-- {mark}:.*?-->\n\n(?:\|.*\n){{2}}((?:\|.*\n)+)", PAGE)
    assert found is not None, mark
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_memory(program):
    rows = table("memory")
    assert len(rows) > 5
    for model, mesh, state, *shown in rows:
        parts = program["memory"](model, mesh, int(state))
        assert shown == [f"{part:.1f}" for part in (*parts, sum(parts))], (model, mesh)


@pytest.mark.parametrize(("mesh", "redundant"), [("dp=4,ep=1", 0), ("dp=4,ep=4", 0), ("dp=4,ep=4", 8)])
def test_a_rank_s_model_has_the_parameters_of_the_program(program, mesh, redundant):
    parallel = ParallelConfig(mesh=mesh, redundant_experts=redundant)
    config = TrainConfig(parallel=parallel)
    share = expert_share(preset("tiny"), parallel, MeshSpec.parse(mesh), rank=1)
    held = sum(parameter.numel() for parameter in build_model(preset("tiny"), config, share).parameters())
    # The gate's correction bias is a parameter in the paper's count, and none that is trained.
    shown = program["memory"]("tiny", mesh, redundant=redundant)[:2]
    assert shown == pytest.approx((2 * held / 1e9, 4 * held / 1e9), rel=1e-4)


def test_bytes_on_the_wire(program):
    rows = table("wire")
    assert len(rows) >= 4
    for model, dispatch, nodes, ranks, *shown in rows:
        found = program["forward_bytes"](model, dispatch, int(nodes), int(ranks))
        assert shown == [f"{number:,}" for number in found], (model, dispatch, nodes)


def test_the_gain_of_placements():
    data = json.loads((ROOT / "docs" / "results" / "placement.json").read_text())
    assert data["commit"].startswith(re.findall(r"benchmarks/placement\.py` at `(\w+)`", PAGE)[0])
    for cluster, loads, *shown in table("placement"):
        ways = {row["way"]: row for row in data["rows"] if (row["cluster"], row["loads"]) == (cluster, loads)}
        greedy, ours = ways["greedy"], ways["abyssal"]
        found = [
            f"{greedy['balance']:.3f}",
            f"{ours['balance']:.3f}",
            f"{greedy['wasted']:.1f}",
            f"{ours['wasted']:.1f}",
        ]
        found += [f"{ways[way]['moves']:.0f}" for way in ("greedy anew", "abyssal, from what is in force")]
        assert shown == found, (cluster, loads)


def shell_commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_commands_are_taken(words):
    from torch.distributed.run import get_args_parser

    ranks = local = 1
    if words[0] == "torchrun":
        split = words.index("-m")
        launcher = get_args_parser().parse_args([*words[1:split], "program"])
        local = int(launcher.nproc_per_node)
        ranks = local * int(launcher.nnodes.split(":")[0])
        words = words[split + 1 :]
    assert words[:2] == ["abyssal", "train"]
    options = parse(train.Options, words[2:], "train")
    mesh = options.train.parallel.mesh_spec(ranks, local)
    moe = preset(options.model).moe
    assert moe is not None and moe.num_experts % mesh.ep == 0
    assert options.train.batch_size % (mesh.dp * (options.train.micro_batch_size or 1)) == 0


def test_messages_are_the_code_s_own():
    """Each message of the table, cut at its numbers and names, is found in the sources."""
    sources = " ".join(path.read_text() for path in (ROOT / "src" / "abyssal").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    rows = re.search(r"## Messages, and what to do\n\n(?:\|.*\n){2}((?:\|.*\n)+)", PAGE)
    assert rows is not None
    for line in rows[1].splitlines():
        message = line.split("|")[1].strip().strip("`")
        pieces = re.split(r"\.\.\.|\d[\d\w=,:.-]*|\(.*?\)|\{.*?\}|node-\S+|dp=\S+|option\S+", message)
        for piece in pieces:
            words = piece.strip(" ,:;()")
            if len(words.split()) > 1:
                assert words in joined, f"{message}: {words!r}"


@pytest.mark.slow
def test_the_commands_for_this_machine_run_one_after_another(tmp_path):
    """Trained on two ranks, and gone on with from the same checkpoint on four and on one: the same held-out loss."""
    text = f"--data {ROOT / 'docs' / 'paper.md'} {ROOT / 'README.md'} --vocab-size 300 --seq-len 64 --save-every 4"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    out, losses = tmp_path / "runs" / "two", []
    for words in (words for words in shell_commands() if "runs/two" in words):
        command = " ".join(words).replace("--steps 200", f"--steps 6 {text}")
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert sum(line["event"] == "step" for line in lines) == 6
        losses.append([line["loss"] for line in lines if line["event"] == "validation"][-1])
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / "step-00000006")
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
