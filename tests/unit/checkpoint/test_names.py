"""The table of names tiles every parameter of every model, and its check notices when it does not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings

from abyssal.checkpoint.names import Piece, belongs_to_mtp, check_complete, checkpoint_table, is_derived, scale_name
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from abyssal.spec.presets import preset
from tests.support.checkpoints import SMALL
from tests.support.specs import specs


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in Transformer(spec, device="meta").state_dict().items()}


@settings(max_examples=60, deadline=None)
@given(specs())
def test_every_element_of_every_parameter_is_in_one_tensor(spec: ModelSpec) -> None:
    table = checkpoint_table(spec)
    check_complete(table, _shapes(spec))
    own = [piece for piece in table if piece.copy_of is None]
    assert sum(prod(piece.hf_shape) for piece in own if not piece.mtp) == spec.total_parameters
    assert sum(prod(piece.hf_shape) for piece in own if piece.mtp) == spec.mtp_parameters
    main = checkpoint_table(spec, include_mtp=False)
    assert main == tuple(piece for piece in table if not piece.mtp)
    for piece in table:
        assert belongs_to_mtp(piece.hf_name, spec.num_layers) == piece.mtp
    names = {piece.hf_name for piece in table} | {scale_name(piece.hf_name) for piece in table}
    assert len(names) == 2 * len(table)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite", "deepseek-llm-7b", "deepseek-llm-67b", "tiny"])
def test_presets_are_complete(name: str) -> None:
    spec = preset(name)
    check_complete(checkpoint_table(spec), _shapes(spec))


def test_names_of_the_published_v3_checkpoint() -> None:
    table = {piece.hf_name: piece for piece in checkpoint_table(preset("deepseek-v3"))}
    assert table["model.layers.0.mlp.gate_proj.weight"].hf_shape == (18432, 7168)
    assert table["model.layers.3.mlp.experts.255.down_proj.weight"].hf_shape == (7168, 2048)
    assert table["model.layers.60.mlp.gate.e_score_correction_bias"].hf_shape == (256,)
    assert table["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].hf_shape == (576, 7168)
    assert table["model.layers.61.eh_proj.weight"].hf_shape == (7168, 14336)
    assert table["model.layers.61.embed_tokens.weight"].copy_of == "model.embed_tokens.weight"
    assert table["model.layers.61.shared_head.head.weight"].copy_of == "lm_head.weight"
    for name in ("enorm", "hnorm", "shared_head.norm", "self_attn.q_a_layernorm", "mlp.shared_experts.up_proj"):
        assert f"model.layers.61.{name}.weight" in table
    own = (prod(piece.hf_shape) for piece in table.values())
    assert round(sum(own) / 1e9, 1) == 684.5  # the repository's 685B: 671.0 + 11.6 + two copies of 0.93


def test_what_stays_unquantised_in_fp8() -> None:
    kept = {piece.hf_name for piece in checkpoint_table(SMALL) if piece.storage == "model"}
    assert kept == {piece.hf_name for piece in checkpoint_table(SMALL) if "norm" in piece.hf_name} | {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.weight",
        *(f"model.layers.2.{name}.weight" for name in ("embed_tokens", "eh_proj", "mlp.gate", "shared_head.head")),
    }
    exact = {piece.hf_name for piece in checkpoint_table(SMALL) if piece.storage == "float32"}
    assert exact == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}


def _first(table: tuple[Piece, ...], ending: str) -> Piece:
    return next(piece for piece in table if piece.hf_name.endswith(ending))


@pytest.mark.parametrize("ending", ["experts.1.up_proj.weight", "experts.3.down_proj.weight", "o_proj.weight", "bias"])
def test_a_forgotten_tensor_is_noticed(ending: str) -> None:
    table = checkpoint_table(SMALL)
    lost = _first(table, ending)
    with pytest.raises(AssertionError, match=lost.parameter):
        check_complete([piece for piece in table if piece != lost], _shapes(SMALL))


def test_other_faults_are_noticed() -> None:
    table, shapes = checkpoint_table(SMALL), _shapes(SMALL)
    up = _first(table, "experts.1.up_proj.weight")
    others = [piece for piece in table if piece != up]
    wrong = {
        "twice in the table": [*table, up],
        "overlap": [*others, replace(up, rows=(0, 30))],
        "does not fit": [*others, replace(up, rows=(30, 61))],
        "which the model lacks": [*others, replace(up, parameter="layers.9.ffn.up")],
        "beyond the experts": [*table, replace(up, hf_name="x", expert=4)],
        "copies": [*table, replace(up, hf_name="x", copy_of="model.norm.weight")],
    }
    for message, pieces in wrong.items():
        with pytest.raises(AssertionError, match=message):
            check_complete(pieces, shapes)
    with pytest.raises(AssertionError, match=r"extra\.weight"):
        check_complete(table, shapes | {"extra.weight": (3, 4)})


def test_derived_tensors() -> None:
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.layers.0.self_attn.q_proj.weight")
    assert not belongs_to_mtp("lm_head.weight", 2)


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys, abyssal.checkpoint.names, abyssal.checkpoint.safetensors_header;sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
