"""Folders that are broken in every way: one error that names the file or tensor, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.checkpoint.contents import check_copies, match
from abyssal.checkpoint.folder import INDEX_FILE, CheckpointFolder, row_blocks
from abyssal.checkpoint.hf import load_model
from abyssal.checkpoint.safetensors_header import TensorEntry
from tests.support.checkpoints import SMALL, rewrite, saved

Q_A = "model.layers.0.self_attn.q_a_proj.weight"
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "model", "bf16")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("quantised") / "model", "fp8")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sharded") / "model", "bf16", max_shard_bytes=200_000)


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / "model")
    return to / "model"


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def _refused(folder: Path, *parts: str, mtp: bool | None = None) -> None:
    """Loading ends in one line that has all ``parts`` and the folder."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_model(folder, mtp=mtp)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    for part in parts:
        assert part in message, message


# ---- tensors ----


def test_a_missing_tensor(whole: Path, tmp_path: Path) -> None:
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.pop(Q_A))
    _refused(folder, f"{Q_A} is missing", "check that every file was fetched whole")


def test_an_unexpected_tensor(whole: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.update(extra))
    _refused(folder, f"{next(iter(extra))} in {SINGLE} is unexpected")


@pytest.mark.parametrize("shape", [(130, 135), (130, 136, 1), (136, 130), (130,)])
def test_a_misshaped_tensor(whole: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.update({Q_A: torch.zeros(shape)}))
    _refused(folder, f"{Q_A} in {SINGLE} has shape {list(shape)}, not [130, 136]")


def test_a_tensor_of_integers(whole: Path, tmp_path: Path) -> None:
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.update({Q_A: torch.zeros(130, 136).char()}))
    _refused(folder, f"{Q_A} in {SINGLE} has dtype I8")


def test_many_faults_are_one_error_with_five_names(whole: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    _refused(rewrite(_copy(whole, tmp_path), edit), "experts.0.gate_proj.weight is missing", "; and 19 more")


def test_weights_of_another_configuration(whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    _edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=31))
    _refused(folder, "mlp.experts.0.gate_proj.weight in model.safetensors has shape [30, 136], not [31, 136]")


# ---- FP8 ----


def test_fp8_without_its_scales(quantised: Path, tmp_path: Path) -> None:
    folder = rewrite(_copy(quantised, tmp_path), lambda tensors: tensors.pop(f"{Q_A}_scale_inv"))
    _refused(folder, f"{Q_A} in {SINGLE} is FP8 without its scales {Q_A}_scale_inv")


def test_fp8_with_scales_of_another_shape(quantised: Path, tmp_path: Path) -> None:
    bad = {f"{Q_A}_scale_inv": torch.ones(1, 2)}
    folder = rewrite(_copy(quantised, tmp_path), lambda tensors: tensors.update(bad))
    _refused(folder, f"{Q_A}_scale_inv is F32 [1, 2], not F32 [2, 2]")


def test_scales_without_fp8(quantised: Path, tmp_path: Path) -> None:
    folder = rewrite(_copy(quantised, tmp_path), lambda tensors: tensors.update({Q_A: tensors[Q_A].bfloat16()}))
    _refused(folder, f"{Q_A}_scale_inv in {SINGLE} is unexpected")


def test_a_scale_that_is_nan(quantised: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_A}_scale_inv"][1, 0] = torch.nan

    _refused(rewrite(_copy(quantised, tmp_path), edit), f"{Q_A}_scale_inv", "infinite or NaN")


def test_another_quantisation(quantised: Path, tmp_path: Path) -> None:
    folder = _copy(quantised, tmp_path)
    _edit_json(folder / "config.json", lambda config: config["quantization_config"].update(weight_block_size=[64, 64]))
    _refused(folder, "quantization_config.weight_block_size", "[64, 64]")


# ---- files and the index ----


def test_no_folder_no_config_no_weights(whole: Path, tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "is not a folder")
    folder = _copy(whole, tmp_path)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    _refused(folder, "pytorch_model*.bin alone")
    (folder / "pytorch_model.bin").unlink()
    _refused(folder, "has neither model.safetensors nor")
    (folder / SINGLE).mkdir()
    _refused(folder, "has neither model.safetensors nor")
    (folder / "config.json").unlink()
    _refused(folder, "config.json")


def test_a_truncated_file(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    _refused(folder, f"{shard}: is truncated: tensor ")


def test_a_shard_that_is_not_there(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    _refused(folder, INDEX_FILE, f"names {shard.name}, not in the folder")


def test_a_shard_missing_from_the_index(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    last = sorted(folder.glob("model-*"))[-1].name

    def forget(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last}

    _edit_json(folder / INDEX_FILE, forget)
    _refused(folder, f"does not name {last}")
    (folder / INDEX_FILE).unlink()
    _refused(folder, f"shards but no {INDEX_FILE}")


def test_an_index_that_disagrees_with_the_files(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    last = sorted(folder.glob("model-*"))[-1].name
    _edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].update({"model.embed_tokens.weight": last}))
    _refused(folder, f"model.embed_tokens.weight (not in {last})", "model.embed_tokens.weight (in model-00001")
    _edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].pop("model.embed_tokens.weight"))
    _refused(folder, "model.embed_tokens.weight (in model-00001")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_that_is_none(sharded: Path, tmp_path: Path, text: str) -> None:
    folder = _copy(sharded, tmp_path)
    (folder / INDEX_FILE).write_text(text)
    _refused(folder, INDEX_FILE, "fetch it again")


def test_both_a_single_file_and_an_index(sharded: Path, whole: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    shutil.copy(whole / SINGLE, folder)
    _refused(folder, "has both")


# ---- multi-token prediction ----


def _is_mtp(name: str) -> bool:
    return name.startswith(f"model.layers.{SMALL.num_layers}.")


def test_a_folder_without_any_mtp_tensor_is_read_without_mtp(whole: Path, tmp_path: Path) -> None:
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if _is_mtp(name)]:
            del tensors[name]

    folder = rewrite(_copy(whole, tmp_path), forget)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers of config.json is 1"):
        assert load_model(folder).spec.mtp_depth == 0
    _refused(folder, "model.layers.2.eh_proj.weight is missing", mtp=True)


@pytest.mark.parametrize("name", ["eh_proj", "embed_tokens", "shared_head.head", "mlp.experts.3.up_proj"])
def test_a_folder_with_some_mtp_tensors_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    lost = f"model.layers.2.{name}.weight"
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.pop(lost))
    _refused(folder, f"{lost} is missing")
    assert load_model(folder, mtp=False).spec.mtp_depth == 0


def test_mtp_tensors_that_the_configuration_denies(whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    _edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    _refused(folder, "model.layers.2.", "is unexpected")
    _refused(folder, "num_nextn_predict_layers", mtp=True)


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_mtp_copies_that_differ(whole: Path, tmp_path: Path, name: str) -> None:
    copy = f"model.layers.2.{name}.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[copy][-1, -1] += 1

    folder = rewrite(_copy(whole, tmp_path), change)
    _refused(folder, f"{copy} is not equal to ", "mtp=False")
    load_model(folder, mtp=False)


def test_copies_in_another_dtype_are_compared_by_value(whole: Path, tmp_path: Path) -> None:
    copy = "model.layers.2.embed_tokens.weight"
    folder = rewrite(_copy(whole, tmp_path), lambda tensors: tensors.update({copy: tensors[copy].double()}))
    with CheckpointFolder(folder) as opened:
        _, pieces = match(opened)
        check_copies(opened, pieces)


def test_frequencies_of_old_checkpoints_are_passed_over(whole: Path, tmp_path: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load_model(rewrite(_copy(whole, tmp_path), lambda tensors: tensors.update(derived)))


# ---- reading ----


@pytest.mark.parametrize(
    "shape", [(1,), (5_000_000,), (20_000_000,), (300, 7), (100_000, 1000), (129280, 7168), (0, 3)]
)
def test_row_blocks_cover_a_tensor_in_multiples_of_128(shape: tuple[int, ...]) -> None:
    blocks = list(row_blocks(TensorEntry("w", "F32", shape)))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])][: len(blocks)]
    assert (blocks[-1][1] if blocks else 0) == shape[0]
    width = torch.Size(shape[1:]).numel()
    for start, stop in blocks:
        assert start % 128 == 0 and ((stop - start) * width <= 8 << 20 or stop - start == 128)


def test_fp8_is_decoded_by_its_scales(quantised: Path) -> None:
    with CheckpointFolder(quantised) as folder:
        codes = folder.read_rows(Q_A, 0, 130).float()
        scales = folder.read_rows(f"{Q_A}_scale_inv", 0, 2)
        expected = codes * scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :136]
        assert torch.equal(folder.decode_rows(Q_A, 0, 130, torch.float32), expected)
        assert torch.equal(folder.decode_rows(Q_A, 128, 130, torch.bfloat16), expected[128:].bfloat16())
        assert folder.dtype() == torch.bfloat16
