"""Models out to folders and back: bit for bit, whatever the family, the placement and the shards."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from abyssal.checkpoint.hf import load_model, load_weights, save_model
from abyssal.checkpoint.layout import FORMATS, Format
from abyssal.checkpoint.names import checkpoint_table
from abyssal.kernels.fp8_block import dequantise_blocks, quantise_blocks
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from abyssal.spec.placement import Placement
from tests.support.checkpoints import SMALL, assert_same_weights, contents, random_model, rewrite, saved
from tests.support.specs import specs


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs())
def test_any_model_comes_back_bit_for_bit(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any") / "model"
    model = random_model(spec)
    save_model(model, folder, "fp32", max_shard_bytes=30_000)
    again = load_model(folder)
    assert again.spec == spec
    assert_same_weights(model, again)
    table = checkpoint_table(spec)
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert stored == {piece.hf_name for piece in table if not piece.optional}


def test_a_call_gives_the_same_logits(tmp_path: Path) -> None:
    model = Transformer(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "m", "fp32")
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(load_model(tmp_path / "m")(tokens), model(tokens))


def test_names_and_rows_on_disk(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "m", "fp32")
    found, state = load_file(tmp_path / "m" / "model.safetensors"), model.state_dict()
    moe = "model.layers.1.mlp"
    experts = state["layers.1.ffn.experts.w_gate_up_EFD"]
    assert torch.equal(found[f"{moe}.experts.2.gate_proj.weight"], experts[2, :30])
    assert torch.equal(found[f"{moe}.experts.2.up_proj.weight"], experts[2, 30:])
    assert torch.equal(found[f"{moe}.experts.3.down_proj.weight"], state["layers.1.ffn.experts.w_down_EDF"][3])
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], state["layers.0.ffn.gate_up.weight"][150:])
    assert torch.equal(found["model.layers.2.eh_proj.weight"], state["mtp.0.projection.weight"])
    assert torch.equal(found["model.layers.2.shared_head.head.weight"], state["head.weight"])
    assert torch.equal(found["model.layers.2.embed_tokens.weight"], state["embed.weight"])
    assert torch.equal(found[f"{moe}.gate.e_score_correction_bias"], state["layers.1.ffn.router.bias_E"])


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_each_format_stores(dtype: Format, tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "m", dtype)
    found = load_file(tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert ("quantization_config" in config) == (dtype == "fp8")
    assert config["torch_dtype"] == ("float32" if dtype == "fp32" else "bfloat16")
    plain = torch.float32 if dtype == "fp32" else torch.bfloat16
    for piece in checkpoint_table(SMALL):
        stored = found.pop(piece.hf_name).dtype
        if piece.storage == "float32":
            assert stored == torch.float32
        elif dtype == "fp8" and piece.storage == "block":
            assert stored == torch.float8_e4m3fn and found.pop(f"{piece.hf_name}_scale_inv").dtype == torch.float32
        else:
            assert stored == plain
    assert not found


@pytest.mark.parametrize(("dtype", "own"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)])
def test_the_dtype_is_the_folders_unless_asked_for(dtype: Format, own: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", dtype)
    for asked, expected in ((None, own), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        state = load_model(folder, dtype=asked).state_dict()
        for name, tensor in state.items():
            assert tensor.dtype == (torch.float32 if name.endswith("bias_E") else expected), name


def test_bf16_and_fp8_hold_the_rounded_values(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "bf16", "bf16")
    state, found = model.state_dict(), load_model(tmp_path / "bf16", torch.float32).state_dict()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor if name.endswith("bias_E") else tensor.bfloat16().float()), name
    save_model(model, tmp_path / "fp8", "fp8")
    found = load_model(tmp_path / "fp8", torch.float32).state_dict()
    up = quantise_blocks(state["layers.0.ffn.gate_up.weight"][150:])  # gate and up have blocks of their own
    assert torch.equal(found["layers.0.ffn.gate_up.weight"][150:], dequantise_blocks(*up))
    down = quantise_blocks(state["layers.1.ffn.experts.w_down_EDF"])
    assert torch.equal(found["layers.1.ffn.experts.w_down_EDF"], dequantise_blocks(*down))
    assert torch.equal(found["embed.weight"], state["embed.weight"].bfloat16().float())
    exact = load_model(tmp_path / "fp8", torch.float64).get_parameter("layers.1.ffn.experts.w_down_EDF")
    assert torch.equal(exact, dequantise_blocks(*down, torch.float64))  # not rounded to FP32 on the way


def test_fp8_saved_again_is_the_same(tmp_path: Path) -> None:
    """A scale is recovered from the block's own maximum: E4M3's largest code is in every block."""
    folder = saved(tmp_path / "a", "fp8")
    save_model(load_model(folder, torch.float32), tmp_path / "b", "fp8")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name, tensor in first.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
        else:
            assert torch.allclose(tensor.double(), second[name].double(), rtol=2e-7, atol=0), name


def test_shards_and_index(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "fp8", max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100_000 or len(tensors) == 1
        for name in tensors:  # a reader of one file can decode what is in it
            if name.endswith("_scale_inv"):
                assert name.removesuffix("_scale_inv") in tensors
    assert_same_weights(load_model(folder), load_model(saved(tmp_path / "one", "fp8")))


# ---- slots ----

REPLICATED = Placement(num_experts=4, slots=(2, 0, 3, 1, 0, 2, 2, 1))


def test_a_load_fills_every_slot_and_a_save_writes_each_expert_once(tmp_path: Path) -> None:
    plain = random_model()
    folder = tmp_path / "plain"
    save_model(plain, folder, "fp32")
    spread = Transformer(SMALL, placements={1: REPLICATED, 2: REPLICATED})
    load_weights(spread, folder)
    for layer in ("layers.1", "mtp.0.block"):
        for stack in ("w_gate_up_EFD", "w_down_EDF"):
            name = f"{layer}.ffn.experts.{stack}"
            assert torch.equal(spread.state_dict()[name], plain.state_dict()[name][list(REPLICATED.slots)])
    save_model(spread, tmp_path / "spread", "fp32")
    assert contents(tmp_path / "spread") == contents(folder)


def test_a_rank_reads_the_experts_of_its_slots(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    whole = load_model(folder).state_dict()
    placement = replace(REPLICATED, num_ranks=2)
    models = [load_model(folder, placements={1: placement, 2: placement}, expert_rank=rank) for rank in range(2)]
    for rank, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            expected = whole[name][list(placement.experts_of_rank(rank))] if ".experts." in name else whole[name]
            assert torch.equal(tensor, expected), name
        assert model.get_parameter("layers.1.ffn.experts.w_down_EDF").shape[0] == 4
    with pytest.raises(ValueError, match=r"expert 3 of layers\.1\..* is in no slot of this model; a model spread over"):
        save_model(models[1], tmp_path / "part")
    without = load_model(folder, mtp=False, placements={1: placement, 2: placement}, expert_rank=1)
    assert list(without.placements()) == [1]
    with pytest.raises(ValueError, match=r"placements: layers \[0\] have no experts"):
        load_model(folder, placements={0: placement})


def test_replicas_that_differ_stop_a_save(tmp_path: Path) -> None:
    spread = Transformer(SMALL, placements={1: REPLICATED})
    load_weights(spread, saved(tmp_path / "m"))
    with torch.no_grad():
        spread.get_parameter("layers.1.ffn.experts.w_down_EDF")[5, 7, 7] += 1  # the second slot of expert 2
    with pytest.raises(AssertionError, match=r"slots of one expert differ: .*experts\.2\.down_proj"):
        save_model(spread, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


# ---- MTP and tied embeddings ----


def test_without_mtp(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "m", "fp32", include_mtp=False)
    assert not any("layers.2." in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    main = load_model(tmp_path / "m", mtp=None)
    assert main.spec == replace(SMALL, mtp_depth=0)
    save_model(model, tmp_path / "with", "fp32")
    assert_same_weights(main, load_model(tmp_path / "with", mtp=False))
    fill = Transformer(replace(SMALL, mtp_depth=0))
    load_weights(fill, tmp_path / "with")
    assert_same_weights(main, fill)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        load_weights(Transformer(SMALL), tmp_path / "m")


def test_a_tied_head_may_be_on_disk_if_it_is_equal(tmp_path: Path) -> None:
    spec = replace(SMALL, tie_embeddings=True)
    folder = saved(tmp_path / "m", spec=spec)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert_same_weights(load_model(folder), random_model(spec))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not equal to model\.embed_tokens\.weight"):
        load_model(folder)


def test_weights_of_another_model_are_not_filled_in(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(40, 136\) and not \(41, 136\)"):
        load_weights(Transformer(replace(SMALL, vocab_size=41)), folder)


# ---- the folder ----


class _Tokenizer:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save(self, folder: str | Path) -> None:
        if self.fails:
            raise OSError("disk full")
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_tokenizer_is_saved_too(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path / "deep" / "m", tokenizer=_Tokenizer())
    assert sorted(contents(tmp_path)) == [
        f"deep/m/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]


def test_a_failed_save_leaves_nothing_and_keeps_what_was(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        save_model(random_model(), tmp_path / "m", tokenizer=_Tokenizer(fails=True))
    assert not list(tmp_path.iterdir())
    saved(tmp_path / "m")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        save_model(random_model(seed=1), tmp_path / "m", tokenizer=_Tokenizer(fails=True), overwrite=True)
    assert contents(tmp_path) == before


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    other = random_model(seed=1)
    with pytest.raises(ValueError, match="exists"):
        save_model(other, tmp_path / "m")
    save_model(other, tmp_path / "m", "fp32", overwrite=True)
    assert_same_weights(load_model(tmp_path / "m"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="exists"):
        save_model(other, tmp_path / "m" / "config.json", overwrite=True)


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    for kind in ("partial", "replaced"):
        (tmp_path / f".m.{os.getpid()}.{kind}").mkdir()
        (tmp_path / f".m.{os.getpid()}.{kind}" / "config.json").write_text("{}")
    other = random_model(seed=1)
    save_model(other, tmp_path / "m", "fp32", overwrite=True)
    assert_same_weights(load_model(tmp_path / "m"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_parameters_are_of_a_dtype_that_computes(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype is {dtype}"):
        load_model(saved(tmp_path / "m"), dtype=dtype)


def test_arguments_and_weights_that_cannot_be_saved(tmp_path: Path) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        save_model(model, tmp_path / "m", "int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_model(model, tmp_path / "m", max_shard_bytes=0)
    with torch.no_grad():
        model.get_parameter("layers.0.attention.q_a.weight")[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_a_proj\.weight cannot be quantised to FP8"):
        save_model(model, tmp_path / "m", "fp8")
    assert not list(tmp_path.iterdir())
