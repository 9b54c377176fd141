"""What a run leaves in its folder, whole or interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from abyssal.checkpoint.hf import load_model
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.folder import RunFolder
from abyssal.train.metrics import StepRecord, ValidationRecord
from abyssal.train.run import run_training
from tests.unit.train.test_step import CONFIG, SPEC, small_text


class Interrupt:
    """An observer that does what a user at the keyboard may do."""

    def on_step(self, record: StepRecord) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    def on_validation(self, record: ValidationRecord) -> None:
        pass


def lines(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_run_keeps_its_metrics_and_leaves_no_model(tmp_path: Path) -> None:
    text, folder = small_text(), RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, text.fitted(SPEC), CONFIG, text, [Interrupt()])
    assert [line["step"] for line in lines(folder) if line["event"] == "step"] == [1, 2]
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "run.json"]
    with pytest.raises(ValueError, match="is not an empty folder"):
        folder.check_free()


def test_a_disk_without_room_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, folder = small_text(), RunFolder(tmp_path / "deep" / "run")
    spec = text.fitted(SPEC)
    num_bytes = 4 * sum(tensor.numel() for tensor in Transformer(spec, device="meta").state_dict().values())
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=num_bytes - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = f"run: the model needs {num_bytes:,} bytes and the disk has {num_bytes - 1:,}"
    with pytest.raises(ValueError, match=message):
        run_training(folder, spec, CONFIG, text)
    assert asked == [tmp_path] and not any(tmp_path.iterdir())


def test_a_finished_run_has_a_model_and_its_figures(tmp_path: Path) -> None:
    text, folder = small_text(), RunFolder(tmp_path / "run")
    result = run_training(folder, text.fitted(SPEC), CONFIG, text)
    validations = [line for line in lines(folder) if line["event"] == "validation"]
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert validations[-1]["bits_per_byte"] == result.evaluation.bits_per_byte
    assert load_model(folder.model).spec == result.model.spec
    assert Tokenizer.from_folder(folder.model).content_hash() == text.tokenizer.content_hash()
    record = json.loads(folder.record.read_text())
    assert record["config"]["optimizer"]["lr"] == CONFIG.optimizer.lr
    assert record["text"]["duplicates_left_out"] == 0
    assert record["text"]["epochs"] == pytest.approx(CONFIG.steps * 4 * 8 / len(text.train_tokens), rel=0.05)
