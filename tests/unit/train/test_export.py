"""A checkpoint of a run as a Hugging Face folder, whatever became of the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from abyssal.checkpoint.hf import load_model, save_model
from abyssal.checkpoint.layout import FORMATS, Format
from abyssal.checkpoint.names import checkpoint_table
from abyssal.checkpoint.rectangles import Rectangle
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.cli.main import main
from abyssal.data.shards import PreparedData
from abyssal.model.lora import LoraConfig
from abyssal.precision.fp8_linear import quantised_weight
from abyssal.precision.recipe import Fp8Options, fp8_recipe
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.config import BalanceConfig, CheckpointConfig, TrainConfig
from abyssal.train.export import export_checkpoint, save_result_from_state
from abyssal.train.folder import RunFolder
from abyssal.train.run import run_training
from abyssal.train.sft import ChatData, save_adapted, sft_run
from tests.support.checkpoints import contents
from tests.support.run_data import run_of
from tests.support.sharded_parts import save_parts
from tests.support.trained_model import TrainedModel
from tests.unit.train.test_run import SAVING, Interrupt
from tests.unit.train.test_sft import chats
from tests.unit.train.test_step import SPEC


@pytest.fixture(scope="module")
def run(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with checkpoints of steps 4 and 6, and an average."""
    folder = RunFolder(tmp_path_factory.mktemp("export") / "run")
    run_training(folder, run_of(prepared, SPEC, SAVING))
    return folder.path


def test_the_newest_checkpoint_is_the_trained_model(run: Path, prepared: PreparedData, tmp_path: Path) -> None:
    for average, trained in ((False, "model"), (True, "model-average")):
        written = export_checkpoint(run, tmp_path / trained, "fp32", average=average)
        one, two = load_model(tmp_path / trained), load_model(run / trained)
        assert written.step == 6 and one.spec == two.spec
        assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert tokenizer.content_hash() == prepared.tokenizer().content_hash()


def test_an_older_step_and_another_dtype(run: Path, tmp_path: Path) -> None:
    assert main(["convert", str(run), str(tmp_path / "four"), "--dtype", "bf16", "--step", "4", "--no-mtp"]) == 0
    model = load_model(tmp_path / "four")
    assert model.embed.weight.dtype == torch.bfloat16 and model.spec.mtp_depth == 0
    assert not torch.equal(model.embed.weight, load_model(run / "model").embed.weight.bfloat16())


def test_a_run_that_died_is_exported(prepared: PreparedData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, run_of(prepared, SPEC, dataclasses.replace(SAVING, ema_decay=None)), [Interrupt(3)])
    assert export_checkpoint(folder.path, tmp_path / "model", "fp32").step == 2
    with pytest.raises(ValueError, match="kept no average of its parameters; leave out --average"):
        export_checkpoint(folder.path, tmp_path / "other", "fp32", average=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("scales", ["ue8m0", "float32"])
def test_a_run_in_fp8_is_saved_and_exported_as_its_products_read_it(
    scales: Literal["ue8m0", "float32"], prepared: PreparedData, tmp_path: Path
) -> None:
    options = Fp8Options(scales=scales)
    config = dataclasses.replace(SAVING, precision="fp8", fp8=options, model_format="fp8")
    folder = RunFolder(tmp_path / "run")
    run_training(folder, run_of(prepared, SPEC, config))
    export_checkpoint(folder.path, tmp_path / "master", "fp32")
    export_checkpoint(folder.path, tmp_path / "average", "fp32", average=True)
    assert main(["convert", str(folder.path), str(tmp_path / "fp8"), "--dtype", "fp8"]) == 0
    masters = {name: load_model(tmp_path / name).state_dict() for name in ("master", "average")}
    formats = fp8_recipe(options).fp8
    assert formats is not None
    for model in (folder.model, tmp_path / "fp8", folder.average):
        master = masters["average" if model == folder.average else "master"]
        found = load_model(model, torch.float32).state_dict()
        pieces = [piece for piece in checkpoint_table(SPEC) if piece.storage == "block"]
        for piece in pieces:
            parts = 2 if "gate_up" in piece.parameter else 1
            _, values = quantised_weight(master[piece.parameter], formats, parts, torch.float32)
            assert torch.equal(found[piece.parameter], values), piece.parameter
        written = json.loads((model / "config.json").read_text())["quantization_config"]
        assert len(pieces) > 10 and (written.get("scale_fmt") == "ue8m0") == (scales == "ue8m0")


# ---- the bytes ----


def cut_up(checkpoint: Path, num_ranks: int = 3) -> None:
    """Put in a checkpoint's place what so many ranks would have saved: rows anywhere, experts cut within."""
    with ShardedReader(checkpoint) as reader:
        reader.check_files()
        fields = reader.fields
        parts: list[dict[str, Tensor | Sharded]] = [{} for _ in range(num_ranks)]
        for number, (name, record) in enumerate(reader.tensors.items()):
            whole = reader.read(name, Rectangle.whole(record.shape))
            axis = min(number % 2, len(record.shape) - 1)
            begin = 0
            for rank, piece in enumerate(whole.tensor_split(num_ranks, axis)):
                offsets = tuple(begin if one == axis else 0 for one in range(len(record.shape)))
                parts[rank][name] = Sharded(record.shape, whole.dtype, (Shard(offsets, piece),))
                begin += piece.shape[axis]
    save_parts(checkpoint, parts, fields)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_bytes_are_those_of_a_save_of_the_model(form: Format, num_ranks: int, run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "tokenizer", "checkpoints"):
        source = run / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (tmp_path / "run").mkdir(exist_ok=True)
        copy(source, tmp_path / "run" / name)
    if num_ranks > 1:
        cut_up(tmp_path / "run" / "checkpoints" / "step-00000006", num_ranks)
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    for average, trained in ((False, "model"), (True, "model-average")):
        saved, exported = tmp_path / f"saved-{trained}", tmp_path / trained
        save_model(load_model(run / trained), saved, form, tokenizer, max_shard_bytes=40_000)
        export_checkpoint(tmp_path / "run", exported, form, average=average, max_shard_bytes=40_000)
        assert contents(exported) == contents(saved) and len(list(saved.glob("*.safetensors"))) > 3


def test_adapters_are_merged_and_saved_as_a_run_does(trained_model: TrainedModel, tmp_path: Path) -> None:
    config = TrainConfig(
        seq_len=64,
        batch_size=2,
        steps=2,
        balance=BalanceConfig(bias_speed=0.0),
        checkpoint=CheckpointConfig(save_every=2),
    )
    lora = LoraConfig(rank=2, targets=("attention", "experts", "ffn"))
    data = ChatData((chats(tmp_path, "a", "b", "c"),))
    folder = RunFolder(tmp_path / "run")
    run = sft_run(trained_model.folder, data, config, lora=lora)
    run_training(folder, run, save=save_adapted(folder, trained_model.folder, run.data))
    names = ("model", "adapter", "base")
    written = {name: contents(folder.path / name) for name in names}
    adapters = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapters.items() if ".self_attn." in name), "they have moved"
    state: dict[str, Tensor | Sharded] = {}
    with ShardedReader(folder.checkpoints / "step-00000002") as reader:
        reader.check_files()
        for name, record in reader.tensors.items():
            state[name] = reader.read(name, Rectangle.whole(record.shape))
    for has_checkpoint in (True, False):
        for name in names:
            shutil.rmtree(folder.path / name)
        save_result_from_state(folder, 2, {} if has_checkpoint else state, run.config.model_format)
        assert {name: contents(folder.path / name) for name in names} == written
        assert not list(folder.path.glob(".*"))
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def test_a_checkpoint_of_another_model_is_not_exported(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    shutil.copytree(run, tmp_path / "run")
    record["model"]["num_layers"] = 3
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"are not those of the run's model: model/layers\.2\..* is missing"):
        export_checkpoint(tmp_path / "run", tmp_path / "m", "fp32")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: has"):
        export_checkpoint(tmp_path / "run", tmp_path / "m", "fp32")
    assert not list(tmp_path.glob("*m*"))


def test_what_is_no_run_or_no_checkpoint_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="has no checkpoint of step 5; choose one of 4, 6"):
        export_checkpoint(run, tmp_path / "m", "fp32", step=5)
    with pytest.raises(ValueError, match=r"holds no run.json, so it is no run"):
        export_checkpoint(tmp_path, tmp_path / "m", "fp32")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text((run / "run.json").read_text())
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export_checkpoint(empty, tmp_path / "m", "fp32")
    (empty / "run.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(ValueError, match="is not the record of a run"):
        export_checkpoint(empty, tmp_path / "m", "fp32")
    assert main(["convert", str(run / "model"), str(tmp_path / "m"), "--dtype", "fp32", "--average"]) == 2
    assert "are of a training run" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
