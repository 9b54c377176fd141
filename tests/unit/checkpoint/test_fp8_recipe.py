"""FP8 checkpoints of models with an FP8 recipe: on disk is what their products multiplied by, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.hf import load_model, save_model
from abyssal.checkpoint.names import checkpoint_table
from abyssal.model.transformer import Transformer
from abyssal.precision.fp8_linear import quantised_weight
from abyssal.precision.recipe import Fp8Options, fp8_recipe
from tests.support.checkpoints import SMALL

EXPERTS = "model.layers.1.mlp.experts"


def trained_model(options: Fp8Options | None = None) -> Transformer:
    """As training leaves one: FP32 weights under an FP8 recipe.  Wide enough for scales that are no powers of two."""
    model = Transformer(SMALL, fp8_recipe(options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def multiplied(model: Transformer, parameter: str, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values that a product of ``model`` reads a parameter as."""
    assert model.recipe.fp8 is not None
    codes, values = quantised_weight(model.state_dict()[parameter], model.recipe.fp8, parts, torch.float32)
    return codes.codes, codes.scales.float(), values


@pytest.mark.parametrize("scales", ["ue8m0", "float32"])
def test_codes_and_scales_are_those_of_training(scales: str, tmp_path: Path) -> None:
    model = trained_model(Fp8Options(scales=scales))  # pyright: ignore[reportArgumentType]
    save_model(model, tmp_path / "m", "fp8")
    found = load_file(tmp_path / "m" / "model.safetensors")

    def assert_stored(hf_name: str, codes: Tensor, scale: Tensor) -> None:
        assert torch.equal(found[hf_name].view(torch.uint8), codes.view(torch.uint8)), hf_name
        assert torch.equal(found[f"{hf_name}_scale_inv"], scale), hf_name

    codes, scale, _ = multiplied(model, "layers.0.ffn.gate_up.weight", 2)
    for part, name in enumerate(("gate_proj", "up_proj")):
        assert_stored(f"model.layers.0.mlp.{name}.weight", codes[part], scale[part])
    codes, scale, _ = multiplied(model, "layers.1.ffn.experts.w_gate_up_EFD", 2)
    for expert in range(4):
        for part, name in enumerate(("gate_proj", "up_proj")):
            assert_stored(f"{EXPERTS}.{expert}.{name}.weight", codes[expert, part], scale[expert, part])
    codes, scale, _ = multiplied(model, "layers.0.attention.q_a.weight")
    assert_stored("model.layers.0.self_attn.q_a_proj.weight", codes, scale)
    powers = all((torch.frexp(tensor)[0] == 0.5).all() for name, tensor in found.items() if name.endswith("_scale_inv"))
    assert powers == (scales == "ue8m0")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config.get("scale_fmt") == ("ue8m0" if powers else None)
    assert "modules_to_not_convert" not in config


@pytest.mark.parametrize("scales", ["ue8m0", "float32"])
def test_what_is_loaded_is_what_training_multiplied_by(scales: str, tmp_path: Path) -> None:
    model = trained_model(Fp8Options(scales=scales))  # pyright: ignore[reportArgumentType]
    save_model(model, tmp_path / "m", "fp8")
    loaded = load_model(tmp_path / "m", torch.float32).state_dict()
    parts = {"gate_up.weight": 2, "w_gate_up_EFD": 2}
    seen = 0
    for piece in checkpoint_table(SMALL):
        if piece.storage == "block":
            ending = next((part for name, part in parts.items() if piece.parameter.endswith(name)), 1)
            assert torch.equal(loaded[piece.parameter], multiplied(model, piece.parameter, ending)[2]), piece.parameter
            seen += 1
    assert seen > 20


def test_with_powers_of_two_bf16_holds_them_exactly(tmp_path: Path) -> None:
    save_model(trained_model(), tmp_path / "m", "fp8")
    narrow, wide = (load_model(tmp_path / "m", dtype).state_dict() for dtype in (torch.bfloat16, torch.float32))
    for piece in checkpoint_table(SMALL):
        if piece.storage == "block":
            assert torch.equal(narrow[piece.parameter].float(), wide[piece.parameter]), piece.parameter


def test_what_the_recipe_keeps_out_of_fp8_is_in_bf16(tmp_path: Path) -> None:
    model = trained_model(Fp8Options(high_precision=("kv_b", "experts.down")))
    save_model(model, tmp_path / "m", "fp8")
    found = load_file(tmp_path / "m" / "model.safetensors")
    plain = {"model.layers.0.self_attn.kv_b_proj", f"{EXPERTS}.3.down_proj"}
    for name in plain:
        assert found[f"{name}.weight"].dtype is torch.bfloat16 and f"{name}.weight_scale_inv" not in found
    assert found["model.layers.0.mlp.down_proj.weight"].dtype is torch.float8_e4m3fn
    named = set(
        json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    )
    assert plain < named and "model.layers.0.mlp.down_proj" not in named
    expected = model.state_dict()["layers.1.ffn.experts.w_down_EDF"].bfloat16()
    assert torch.equal(load_model(tmp_path / "m").state_dict()["layers.1.ffn.experts.w_down_EDF"], expected)


def test_converting_to_fp8_again_changes_no_tensor(tmp_path: Path) -> None:
    save_model(trained_model(Fp8Options(high_precision=("out",))), tmp_path / "m", "fp8")
    convert(tmp_path / "m", tmp_path / "again", "fp8")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype is tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_one_scale_a_tensor_fits_no_checkpoint(tmp_path: Path) -> None:
    model = trained_model(Fp8Options(granularity="tensor"))
    with pytest.raises(ValueError, match=r"e4m3 with tensor scales.*save the model as bf16 or fp32"):
        save_model(model, tmp_path / "m", "fp8")
    assert not (tmp_path / "m").exists()
    save_model(model, tmp_path / "m", "bf16")
