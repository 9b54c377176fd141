"""config.json: read as published, written back, and refused by field where the maths would differ."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.spec.hf_config import check_writable, parse_config, read_config, write_config
from abyssal.spec.hf_quantization import BlockQuantization, read_quantization
from abyssal.spec.model import MoESpec
from abyssal.spec.presets import PRESETS, preset
from tests.support.published_configs import DEEPSEEK_LLM_7B, DEEPSEEK_V2, DEEPSEEK_V2_LITE, DEEPSEEK_V3, PUBLISHED
from tests.support.specs import specs


def _with(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``config`` with the field at ``path`` ("rope_scaling.type") set, or dropped if ``value`` is Ellipsis."""
    name, _, rest = path.partition(".")
    if rest:
        return config | {name: _with(config[name], rest, value)}
    return {key: old for key, old in config.items() if key != name} | ({} if value is ... else {name: value})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_preset(name):
    # The reports initialise with 0.006, the files say transformers' 0.02.
    assert parse_config(PUBLISHED[name]) == replace(preset(name), init_std=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_file(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(preset(name))))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == preset(name)


@given(specs())
def test_any_spec_survives_the_file(spec):
    assert parse_config(json.loads(json.dumps(write_config(spec)))) == spec


@given(specs(("deepseek_v3",)))
def test_without_mtp_the_file_describes_the_main_model(spec):
    config = write_config(spec, include_mtp=False)
    assert config["num_nextn_predict_layers"] == 0
    assert parse_config(config) == replace(spec, mtp_depth=0)


def test_what_is_written_beside_the_spec():
    spec = preset("tiny")
    assert write_config(spec)["torch_dtype"] == write_config(spec, "bf16")["torch_dtype"] == "bfloat16"
    assert write_config(spec, "fp32")["torch_dtype"] == "float32"
    assert "quantization_config" not in write_config(spec)
    assert write_config(spec)["architectures"] == ["DeepseekV3ForCausalLM"]
    with pytest.raises(ValueError, match=r"dtype is 'fp8'.*quantization='fp8'"):
        write_config(spec, "fp8")


@pytest.mark.parametrize(
    ("config", "path", "value", "named"),
    [
        (DEEPSEEK_V3, "model_type", "deepseek_v4", "model_type is 'deepseek_v4'"),
        (DEEPSEEK_V3, "model_type", ..., "model_type is missing"),
        (DEEPSEEK_V3, "kv_lora_rank", ..., "kv_lora_rank is missing"),
        (DEEPSEEK_V3, "q_lora_rank", ..., "q_lora_rank is missing"),
        (DEEPSEEK_V3, "n_group", ..., "n_group is missing"),
        (DEEPSEEK_V3, "routed_scaling_factor", None, "routed_scaling_factor is None"),
        (DEEPSEEK_V3, "first_k_dense_replace", ..., "first_k_dense_replace is missing"),
        (DEEPSEEK_V3, "n_routed_experts", ..., "n_routed_experts is missing"),
        (DEEPSEEK_V3, "hidden_size", "7168", "hidden_size is '7168'"),
        (DEEPSEEK_V3, "hidden_size", 7168.0, "hidden_size is 7168.0"),
        (DEEPSEEK_V3, "num_hidden_layers", True, "num_hidden_layers is True"),
        (DEEPSEEK_V3, "rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        (DEEPSEEK_V3, "tie_word_embeddings", 1, "tie_word_embeddings is 1"),
        (DEEPSEEK_V3, "eos_token_id", [1, "2"], r"eos_token_id is \[1, '2'\]"),
        (DEEPSEEK_V3, "sliding_window", 4096, "sliding_window is 4096: this field is unknown"),
        (DEEPSEEK_V3, "use_sliding_window", False, "use_sliding_window is False: this field is unknown"),
        (DEEPSEEK_V3, "hidden_act", "gelu", "hidden_act is 'gelu'"),
        (DEEPSEEK_V3, "attention_bias", True, "attention_bias is True"),
        (DEEPSEEK_V3, "attention_bias", 0, "attention_bias is 0"),
        (DEEPSEEK_V3, "attention_dropout", 0.1, "attention_dropout is 0.1"),
        (DEEPSEEK_V3, "moe_layer_freq", 2, "moe_layer_freq is 2"),
        (DEEPSEEK_V3, "scoring_func", "softmax", "scoring_func is 'softmax'"),
        (DEEPSEEK_V3, "topk_method", "greedy", "topk_method is 'greedy'"),
        (DEEPSEEK_V3, "num_key_value_heads", 8, "num_key_value_heads is 8"),
        (DEEPSEEK_V3, "head_dim", 128, "head_dim is 128"),
        (DEEPSEEK_V3, "qk_head_dim", 128, "qk_head_dim is 128"),
        (DEEPSEEK_V3, "num_mtp_layers", 2, "num_mtp_layers is 2"),
        (DEEPSEEK_V3, "num_local_experts", 128, "it contradicts num_local_experts"),
        (DEEPSEEK_V3, "num_experts_per_tok", 200, "moe.top_k is 200"),
        (DEEPSEEK_V3, "rope_scaling", "yarn", "rope_scaling is 'yarn'"),
        (DEEPSEEK_V3, "rope_scaling.type", "linear", "rope_scaling.type is 'linear'"),
        (DEEPSEEK_V3, "rope_scaling.rope_type", "linear", "rope_scaling.rope_type is 'linear'"),
        (DEEPSEEK_V3, "rope_scaling.factor", ..., "rope_scaling.factor is missing"),
        (
            DEEPSEEK_V3,
            "rope_scaling.original_max_position_embeddings",
            ...,
            "original_max_position_embeddings is missi",
        ),
        (DEEPSEEK_V3, "rope_scaling.truncate", False, "rope_scaling.truncate is False"),
        (DEEPSEEK_V3, "rope_scaling.attention_factor", 1.0, "rope_scaling.attention_factor is 1.0"),
        (DEEPSEEK_V3, "rope_scaling.mscale", ..., "rope_scaling.mscale is missing"),
        (
            DEEPSEEK_V3,
            "rope_scaling.low_freq_factor",
            1.0,
            "rope_scaling.low_freq_factor is 1.0: this field is unknown",
        ),
        (DEEPSEEK_V3, "rope_parameters", {"rope_type": "default"}, "it contradicts rope_parameters"),
        (DEEPSEEK_V3, "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, "contradict"),
        (DEEPSEEK_V3, "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        (DEEPSEEK_V2, "norm_topk_prob", True, "norm_topk_prob is True"),
        (DEEPSEEK_V2, "topk_method", "noaux_tc", "topk_method is 'noaux_tc'"),
        (DEEPSEEK_V2, "scoring_func", "sigmoid", "scoring_func is 'sigmoid'"),
        (DEEPSEEK_V2, "rope_interleave", False, "rope_interleave is False"),
        (DEEPSEEK_V2, "num_nextn_predict_layers", 1, "spec.mtp_depth is 1"),
        (DEEPSEEK_V2, "n_group", None, "n_group is None"),
        (DEEPSEEK_LLM_7B, "mlp_bias", True, "mlp_bias is True"),
        (DEEPSEEK_LLM_7B, "num_attention_heads", 31, "head_dim is missing"),
        (DEEPSEEK_LLM_7B, "num_key_value_heads", 7, "attention.num_kv_heads is 7"),
        (DEEPSEEK_LLM_7B, "n_routed_experts", 64, "n_routed_experts is 64: this field is unknown"),
        (DEEPSEEK_LLM_7B, "vocab_size", 100000, "spec.bos_token_id is 100000"),
    ],
)
def test_a_field_that_changes_the_maths_is_refused(config, path, value, named):
    changed = _with(config, path, value)
    with pytest.raises(ValueError, match=named) as raised:
        parse_config(changed, "DIR/config.json")
    assert str(raised.value).startswith("DIR/config.json: ") and "\n" not in str(raised.value)


@given(
    st.sampled_from([DEEPSEEK_V3, DEEPSEEK_V2_LITE, DEEPSEEK_LLM_7B]),
    st.from_regex(r"[a-z]{3,}_[a-z]{3,}", fullmatch=True),
    st.booleans() | st.integers() | st.text(),
)
def test_an_unknown_field_is_never_skipped(config, name, value):
    parse_config(config | {name + "_x": None})
    with pytest.raises(ValueError, match=f"{name}_x is"):
        parse_config(config | {name + "_x": value})


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (DEEPSEEK_V3, "seq_aux", False),
        (DEEPSEEK_V3, "aux_loss_alpha", 0.0),
        (DEEPSEEK_V3, "sliding_window", None),
        (DEEPSEEK_V3, "scoring_func", ...),
        (DEEPSEEK_V3, "topk_method", ...),
        (DEEPSEEK_V3, "rope_theta", ...),
        (DEEPSEEK_V3, "num_mtp_layers", 1),
        (DEEPSEEK_V3, "rope_scaling.rope_type", "yarn"),
        (DEEPSEEK_V3, "rope_scaling.beta_fast", ...),
        (DEEPSEEK_V3, "rope_scaling.truncate", True),
        (DEEPSEEK_V2_LITE, "n_group", None),
        (DEEPSEEK_V2_LITE, "norm_topk_prob", ...),
        (DEEPSEEK_LLM_7B, "num_key_value_heads", ...),
        (DEEPSEEK_LLM_7B, "head_dim", None),
        (DEEPSEEK_LLM_7B, "rms_norm_eps", ...),
    ],
)
def test_fields_that_change_nothing(config, path, value):
    assert parse_config(_with(config, path, value)) == parse_config(config)


def test_mscale_of_one_alone_is_the_default_written_out():
    for all_dim in (..., 0):
        yarn = parse_config(_with(DEEPSEEK_V3, "rope_scaling.mscale_all_dim", all_dim)).yarn
        assert yarn is not None and yarn.mscale is None and yarn.mscale_all_dim is None
    with pytest.raises(ValueError, match=r"rope_scaling\.mscale is 0\.707: with mscale_all_dim None readers differ"):
        parse_config(_with(DEEPSEEK_V2, "rope_scaling.mscale_all_dim", ...))


def test_experts_that_no_layer_has_are_no_experts():
    dense = DEEPSEEK_V3 | {"first_k_dense_replace": 62}
    assert parse_config(dense).moe is None and parse_config(dense).mtp_depth == 1
    with pytest.raises(ValueError, match=r"spec\.num_dense_layers is 61 of 61"):
        parse_config(DEEPSEEK_V3 | {"first_k_dense_replace": 61})  # only the MTP module would have experts


def test_greedy_routing_ignores_groups():
    moe = parse_config(DEEPSEEK_V2_LITE | {"n_group": 8, "topk_group": 3}).moe
    assert moe is not None and (moe.num_groups, moe.num_kept_groups) == (1, 1)


def test_absent_mtp_means_none():
    assert parse_config(_with(DEEPSEEK_V3, "num_nextn_predict_layers", ...)).mtp_depth == 0


def test_the_layout_of_transformers_5():
    scaling = DEEPSEEK_V3["rope_scaling"]
    parameters = _with(scaling, "type", ...) | {"rope_type": "yarn", "rope_theta": 10000.0}
    config = _with(_with(DEEPSEEK_V3, "rope_scaling", ...), "rope_theta", ...)
    config |= {"rope_parameters": parameters, "head_dim": 64, "qk_head_dim": 192, "dtype": "bfloat16"}
    assert parse_config(config) == parse_config(DEEPSEEK_V3)


def test_two_values_of_theta_are_refused():
    parameters = {"rope_type": "default", "rope_theta": 50000.0}
    with pytest.raises(ValueError, match=r"rope_theta is 10000\.0: the file states 10000\.0 and 50000\.0"):
        parse_config(DEEPSEEK_LLM_7B | {"rope_parameters": parameters})


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    path.write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list"):
        read_config(path)


def test_quantisation_is_read_apart():
    assert read_quantization(DEEPSEEK_V3) == BlockQuantization()
    assert read_quantization(DEEPSEEK_V2) is None
    powers = _with(DEEPSEEK_V3, "quantization_config.scale_fmt", "ue8m0")
    assert read_quantization(powers) == BlockQuantization(power_of_two_scales=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("fmt", "e5m2"),
        ("weight_block_size", [64, 64]),
        ("weight_block_size", ...),
        ("activation_scheme", "static"),
        ("scale_fmt", "e8m0"),
        ("bits", 4),
    ],
)
def test_other_quantisations_are_refused(field, value):
    config = _with(DEEPSEEK_V3, f"quantization_config.{field}", value)
    for read in (read_quantization, parse_config):
        with pytest.raises(ValueError, match=rf"quantization_config\.{field} is "):
            read(config)


@pytest.mark.parametrize("power_of_two_scales", [False, True])
def test_quantisation_survives_the_file(power_of_two_scales):
    quantization = BlockQuantization(power_of_two_scales=power_of_two_scales)
    assert read_quantization(write_config(preset("tiny"), quantization=quantization)) == quantization
    assert write_config(preset("tiny"), quantization="fp8")["quantization_config"] == DEEPSEEK_V3["quantization_config"]


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("tiny", {"correction_bias": False}, "spec.moe.correction_bias is False"),
        ("tiny", {"scoring": "softmax"}, "spec.moe.scoring is 'softmax'"),
        ("deepseek-v2", {"renormalise": True}, "spec.moe.renormalise is True"),
        ("deepseek-v2", {"scoring": "sigmoid"}, "spec.moe.scoring is 'sigmoid'"),
    ],
)
def test_a_gate_that_the_format_cannot_express_is_not_written(name, changes, named):
    spec = preset(name)
    assert isinstance(spec.moe, MoESpec)
    unsaveable = replace(spec, moe=replace(spec.moe, **changes))
    for refuse in (check_writable, write_config):
        with pytest.raises(ValueError, match=named):
            refuse(unsaveable)
