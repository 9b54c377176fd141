"""``abyssal train`` and ``abyssal sft`` on many ranks, from the command line to the folders that they leave."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.checkpoint.hf import load_model
from abyssal.cli.main import main
from abyssal.cli.train import main as train
from tests.support.forked_ranks import Ended, RankStarter
from tests.support.killed_ranks import events, prepare, torchrun

OPTIONS = ["--seq-len", "24", "--batch-size", "4", "--steps", "4", "--validate-every", "2", "--validation-batches", "1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one rank."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(_train(prepared, out, "--save-every", "2")) == 0
    return out


def _train(prepared: Path, out: Path, *options: str) -> list[str]:
    paths = "--init", str(prepared / "model"), "--data", str(prepared / "data"), "--out", str(out)
    return ["train", *paths, *OPTIONS, *options]


def _assert_well(ends: dict[int, Ended], model: Path) -> None:
    """All ended well, and rank 0 alone said something."""
    assert [end.code for end in ends.values()] == [0] * len(ends), ends
    assert ends[0].output.splitlines()[-1].startswith(f"{model}: ")
    assert all(end.output == end.errors == "" for rank, end in ends.items() if rank), ends


def _assert_alike(out: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same losses and the same model, but for the order of sums."""
    for ours, theirs in zip(_losses(out), _losses(other), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    ours, theirs = (load_model(run / "model").state_dict() for run in (out, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def _losses(out: Path) -> list[float]:
    return [event["loss"] for event in events(out) if event["event"] in ("step", "validation")]


def _record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


PIPELINE = ["--schedule", "1f1b", "--micro-batch-size", "2"]


@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "pp=2,dp=1", None])
def test_a_run_on_ranks_is_the_run_on_one(
    mesh: str | None, rank_starter: RankStarter, prepared: Path, alone: Path, tmp_path: Path
) -> None:
    """With and without experts spread out; without checkpoints there is a model all the same, and nothing else."""
    out = tmp_path / "run"
    options = ["--save-every", "0", *(() if mesh is None else ("--mesh", mesh))]
    options += PIPELINE if mesh == "pp=2,dp=1" else []
    _assert_well(rank_starter.start(2, "abyssal", *_train(prepared, out, *options)).wait(), out / "model")
    _assert_alike(out, alone)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model", "run.json", "tokenizer"]
    assert _record(out)["config"]["parallel"]["mesh"] == mesh
    assert all("ranks" in json.loads(line) for line in (out / "metrics.jsonl").open() if '"event": "step"' in line)


def test_a_run_goes_on_on_another_mesh(rank_starter: RankStarter, prepared: Path, alone: Path, tmp_path: Path) -> None:
    """Begun on one rank, gone on with on two; the last checkpoint taken away, gone on with on one again."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    resume = ["train", "--out", str(out), "--resume"]
    _assert_well(rank_starter.start(2, "abyssal", *resume, "--mesh", "dp=2,ep=2").wait(), out / "model")
    _assert_alike(out, alone)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 -m abyssal train"):
        train([*resume[1:], "--mesh", "dp=2,ep=2"])
    assert main([*resume, "--mesh", "dp=1"]) == 0
    _assert_alike(out, alone)


def test_resuming_something_else_is_refused_once(rank_starter: RankStarter, alone: Path) -> None:
    ends = rank_starter.start(2, "abyssal", "train", "--out", str(alone), "--resume", "--seed", "7").wait()
    assert [end.code for end in ends.values()] == [2, 2] and ends[1].errors == "", ends
    assert "has config.seed 0, and this one 7" in ends[0].errors and ends[0].errors.count("\n") == 1


def test_adapters_on_ranks(rank_starter: RankStarter, prepared: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = []
    for number in range(30):
        said = {"user": f"number {number}", "assistant": f"of {number % 7} and {number * number}"}
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said.items()]}))
    chats.write_text("\n".join(lines), encoding="utf-8")
    shape = ["--lora", "--lora-rank", "2", "--bias-speed", "0", "--seq-len", "40", "--batch-size", "2", "--steps", "2"]
    shape += ["--template", "deepseek-v3", "--held-out", "0.2"]
    command = ["sft", str(prepared / "model"), "--data", str(chats), *shape, "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    ends = rank_starter.start(2, "abyssal", *command, str(tmp_path / "two"), "--mesh", "dp=2,ep=2").wait()
    assert [end.code for end in ends.values()] == [0, 0] and ends[1].output == ends[1].errors == "", ends
    _assert_alike(tmp_path / "two", tmp_path / "one")
    for folder in ("adapter", "base"):
        names = [sorted(path.name for path in (tmp_path / run / folder).iterdir()) for run in ("one", "two")]
        assert names[0] == names[1] and names[0]


@pytest.mark.slow
def test_two_nodes_under_torchrun(prepared: Path, alone: Path, tmp_path: Path) -> None:
    """Two launchers that meet on the loopback, two ranks each, tokens by way of the nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "run"
    options = _train(prepared, out, "--mesh", "dp=4,ep=4", "--dispatch", "hierarchical")
    nodes = [torchrun(options, 0, *meet) for _ in range(2)]
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    _assert_alike(out, alone)
    ranks = [json.loads(line)["ranks"] for line in (out / "metrics.jsonl").open() if '"event": "step"' in line]
    assert all(step["across"] > 0 for step in ranks)
