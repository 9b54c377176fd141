"""What a run leaves in its folder, whole, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abyssal.checkpoint.hf import load_model
from abyssal.data.shards import PreparedData
from abyssal.model.share import ExpertShare
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.checkpoints import saved_checkpoints
from abyssal.train.config import CheckpointConfig, TrainConfig
from abyssal.train.fault import TrainingFault
from abyssal.train.folder import RunFolder
from abyssal.train.history import History
from abyssal.train.loop import build_model
from abyssal.train.metrics import StepRecord, ValidationRecord
from abyssal.train.run import run_training
from tests.support.run_data import prepare_texts, run_of
from tests.unit.train.test_step import CONFIG, SPEC

SAVING = dataclasses.replace(CONFIG, steps=6, ema_decay=0.9, checkpoint=CheckpointConfig(save_every=2, keep=2))


class Interrupt:
    """An observer that does what a user at the keyboard may do."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self._step:
            raise KeyboardInterrupt

    def on_validation(self, record: ValidationRecord) -> None:
        pass

    def on_event(self, event: Mapping[str, Any]) -> None:
        pass


def lines(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def names(path: Path) -> list[str]:
    return sorted(path.name for path in path.iterdir() if not path.name.startswith("."))


def test_the_same_run_twice_gives_the_same_numbers(prepared: PreparedData, tmp_path: Path) -> None:
    def run(name: str, **fields: Any) -> tuple[list[float], list[tuple[int, float]]]:
        history = History()
        run_training(
            RunFolder(tmp_path / name), run_of(prepared, SPEC, dataclasses.replace(CONFIG, **fields)), [history]
        )
        return history.losses, history.validations

    assert run("a", compute="bfloat16") == run("b", compute="bfloat16") != run("c", compute="bfloat16", seed=1)


def test_an_interrupted_run_keeps_its_metrics_and_leaves_no_model(prepared: PreparedData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run_of(prepared, SPEC, CONFIG), [Interrupt(2)])
    assert [line["step"] for line in lines(folder) if line["event"] == "step"] == [1, 2]
    assert names(folder.path) == ["checkpoints", "metrics.jsonl", "run.json", "tokenizer"]
    with pytest.raises(ValueError, match="is not an empty folder; go on with --resume"):
        folder.check_free()


def test_a_token_that_killed_ranks_left_does_not_fill_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".shared-0123456789abcdef").touch()
    RunFolder(tmp_path).check_free()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        RunFolder(tmp_path).check_free()


def test_a_resumed_run_ends_as_one_that_never_stopped(prepared: PreparedData, tmp_path: Path) -> None:
    """Weights, average and every line of the metrics but times."""
    run = run_of(prepared, SPEC, SAVING)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    run_training(whole, run)
    for step in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            run_training(parts, run, [Interrupt(step)], resume=True)
    run_training(parts, run, resume=True)
    for folder in ("model", "model-average"):
        one, two = (load_model(path / folder).state_dict() for path in (whole.path, parts.path))
        assert all(torch.equal(one[name], two[name]) for name in one), folder
    timed = {"seconds", "tokens_per_second", "share_of_peak"}

    def plain(folder: RunFolder) -> list[dict]:
        found = [{k: v for k, v in line.items() if k not in timed} for line in lines(folder)]
        return [line for line in found if line["event"] != "resume"]

    assert plain(parts) == plain(whole)
    assert [line["step"] for line in lines(parts) if line["event"] == "resume"] == [2, 4]
    assert [saved.step for saved in saved_checkpoints(parts.checkpoints)] == [4, 6]


def test_a_resume_before_any_checkpoint_begins_anew(prepared: PreparedData, tmp_path: Path) -> None:
    run, folder = run_of(prepared, SPEC, SAVING), RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run, [Interrupt(1)], resume=True)
    run_training(folder, run, resume=True)
    assert [line["step"] for line in lines(folder) if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_another_run_is_not_resumed(prepared: PreparedData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run = run_of(prepared, SPEC, SAVING)
    run_training(folder, run)

    def refused(other) -> str:
        with pytest.raises(ValueError, match="resume with what it had") as error:
            run_training(folder, other, resume=True)
        return str(error.value)

    faster = dataclasses.replace(SAVING, optimizer=dataclasses.replace(SAVING.optimizer, lr=0.5))
    assert "config.optimizer.lr 0.01, and this one 0.5" in refused(run_of(prepared, SPEC, faster))
    assert "config.steps 6, and this one 7" in refused(run_of(prepared, SPEC, dataclasses.replace(SAVING, steps=7)))
    assert "config.seq_len 8, and" in refused(run_of(prepared, SPEC, dataclasses.replace(SAVING, seq_len=7)))
    deeper = dataclasses.replace(SPEC, mtp_depth=2)
    assert "model.mtp_depth 1, and this one 2" in refused(run_of(prepared, deeper, SAVING))
    more = prepare_texts(tmp_path / "more", ["alpha beta " * 40, "gamma delta " * 40], prepared.tokenizer())
    assert "data.sources[0].fingerprint" in refused(run_of(more, SPEC, SAVING))
    other = prepare_texts(tmp_path / "other", [f"entirely different text {n}" * 20 for n in range(9)], 290)
    assert "data.tokenizer" in refused(run_of(other, SPEC, SAVING))
    watched = dataclasses.replace(SAVING, validate_every=3, checkpoint=CheckpointConfig(save_every=3))
    run_training(folder, run_of(prepared, SPEC, watched), resume=True)  # what changes no number may differ


def test_a_record_older_than_a_field_has_its_default(prepared: PreparedData, tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path / "run"), dataclasses.replace(SAVING, compute="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run_of(prepared, SPEC, config), [Interrupt(3)])
    record = json.loads(folder.record.read_text())
    del record["config"]["precision"], record["config"]["fp8"]
    folder.record.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r'has config\.precision "compute", and this one "fp8"'):
        run_training(folder, run_of(prepared, SPEC, dataclasses.replace(config, precision="fp8")), resume=True)
    assert run_training(folder, run_of(prepared, SPEC, config), resume=True).trainer.steps_done == 6


def test_a_resume_that_saves_no_more_checkpoints_goes_on_from_the_newest(
    prepared: PreparedData, tmp_path: Path
) -> None:
    folder, run = RunFolder(tmp_path / "run"), run_of(prepared, SPEC, SAVING)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run, [Interrupt(5)])
    none = dataclasses.replace(SAVING, checkpoint=CheckpointConfig(save_every=0))
    run_training(folder, run_of(prepared, SPEC, none), resume=True)
    assert [line["step"] for line in lines(folder) if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(folder) if line["event"] == "resume"] == [4]


def test_checkpoints_of_no_known_run_are_not_gone_on_from(prepared: PreparedData, tmp_path: Path) -> None:
    folder, run = RunFolder(tmp_path / "run"), run_of(prepared, SPEC, SAVING)
    run_training(folder, run)
    folder.record.unlink()
    with pytest.raises(ValueError, match=r"has checkpoints and no run\.json that says of what"):
        run_training(folder, run, resume=True)


def test_a_fault_names_the_last_good_checkpoint(prepared: PreparedData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    optimizer = dataclasses.replace(SAVING.optimizer, lr=1e30, lr_schedule="constant:0.5:0 constant:1:1")
    config = dataclasses.replace(SAVING, optimizer=optimizer, validate_every=5)
    with pytest.raises(TrainingFault, match=r"step 4: .*last good checkpoint is .*step-00000002; step-00000004 holds"):
        run_training(folder, run_of(prepared, SPEC, config))
    assert [saved.step for saved in saved_checkpoints(folder.checkpoints)] == [2, 4]


@pytest.mark.parametrize("last", [True, False])
def test_a_validation_that_is_not_finite_is_a_fault(prepared: PreparedData, tmp_path: Path, last: bool) -> None:
    """Also after the last step, which no other step would find out: no model is saved."""
    folder = RunFolder(tmp_path / "run")
    optimizer = dataclasses.replace(SAVING.optimizer, lr=1e30, lr_schedule="constant:0.5:0 constant:1:1")
    config = dataclasses.replace(SAVING, steps=4 if last else 6, optimizer=optimizer, validate_every=4)
    if last:
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(optimizer, lr_schedule="constant:0.6:0 constant:1:1")
        )
    found = r"after step 4 the held-out loss is nan; .* is not finite; .*; the last good checkpoint is .*step-00000002"
    with pytest.raises(TrainingFault, match=found + ("; step-00000004 holds" if last else "$")):
        run_training(folder, run_of(prepared, SPEC, config))
    assert not folder.model.exists()


def test_a_starved_expert_is_told(prepared: PreparedData, tmp_path: Path) -> None:
    """Once, when its steps are full, although the run is resumed in between."""
    balance = dataclasses.replace(SAVING.balance, bias_speed=0.0, alarm_steps=3)
    run = run_of(prepared, SPEC, dataclasses.replace(SAVING, balance=balance))

    def starving(spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None) -> Transformer:
        model = build_model(spec, config, share)
        model.get_buffer("layers.1.ffn.router.bias_E")[2] = -100.0  # its group is not kept either
        return model

    run, folder = dataclasses.replace(run, start=starving), RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run, [Interrupt(3)])
    run_training(folder, run, resume=True)
    assert [line["step"] for line in lines(folder) if line["event"] == "resume"] == [2]
    assert [line for line in lines(folder) if line["event"] == "alarm"] == [
        {"event": "alarm", "step": 3, "layer": 1, "experts": [2, 3], "steps": 3}
    ]


def test_a_disk_without_room_is_refused_before_training(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=100_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(ValueError, match=r"run: the model needs .* bytes .* and the disk has 100,000; make room"):
        run_training(folder, run_of(prepared, SPEC, CONFIG))
    assert asked == [tmp_path] and not any(tmp_path.iterdir())


def test_a_finished_run_has_a_model_and_its_figures(prepared: PreparedData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    result = run_training(folder, run_of(prepared, SPEC, CONFIG))
    validations = [line for line in lines(folder) if line["event"] == "validation"]
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert validations[-1]["bits_per_byte"] == result.evaluation.bits_per_byte
    assert load_model(folder.model).spec == result.model.spec
    assert Tokenizer.from_folder(folder.model).content_hash() == prepared.tokenizer().content_hash()
    record = json.loads(folder.record.read_text())
    assert record["config"]["optimizer"]["lr"] == CONFIG.optimizer.lr
    assert record["data"]["sources"][0]["train_tokens"] == prepared.train.num_tokens
    assert record["data"]["epochs"] == pytest.approx(CONFIG.plan().num_tokens / prepared.train.num_tokens, rel=0.05)
    steps = [line for line in lines(folder) if line["event"] == "step"]
    assert [line["tokens"] for line in steps] == [32, 64, 96, 128]
    assert all(0 < line["share_of_peak"] < 1 for line in steps)
    assert steps[0]["max_violation"] == pytest.approx(
        sum(steps[0]["max_violation_by_layer"].values()) / len(steps[0]["max_violation_by_layer"]), abs=1e-5
    )


def test_a_run_resumed_at_its_end_has_one_last_validation(prepared: PreparedData, tmp_path: Path) -> None:
    run, folder = run_of(prepared, SPEC, SAVING), RunFolder(tmp_path / "run")
    run_training(folder, run)
    before = lines(folder)
    run_training(folder, run, resume=True)
    assert [line for line in lines(folder) if line["event"] != "resume"] == before
