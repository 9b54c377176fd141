"""Hugging Face ``config.json``, read and written field by field, for the three families.

``model_type`` deepseek_v3, deepseek_v2 and llama, in the published layout and in transformers 5's.  Each field is
mapped, or must hold the one value that the model implements, or is listed in :data:`HARMLESS` because it changes no
number the model computes.  Any other field that is not null is refused by name.  Defaults are taken only where
DeepSeek's own code and transformers agree on them; sizes and gates have to be stated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from abyssal.spec.hf_fields import FieldError, Fields
from abyssal.spec.hf_quantization import BlockQuantization, parse_quantization, write_quantization
from abyssal.spec.hf_rope import read_rope, write_rope
from abyssal.spec.model import FAMILIES, GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec, MoESpec

CONFIG_NAME = "config.json"

HARMLESS = frozenset(
    {
        # what wrote the file, and which classes run it elsewhere
        *("architectures", "auto_map", "transformers_version", "tokenizer_class", "_name_or_path", "name_or_path"),
        *("_attn_implementation", "_experts_implementation", "_commit_hash"),
        # the dtype on disk, which the tensors state themselves
        *("torch_dtype", "dtype"),
        # how a run is laid out, or what it returns beside the logits
        *("use_cache", "ep_size", "pretraining_tp", "return_dict", "output_router_logits", "output_hidden_states"),
        *("output_attentions", "chunk_size_feed_forward"),
        # the auxiliary losses of a training run: ours come from the run's own configuration
        *("aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
        # heads of other tasks
        *("id2label", "label2id", "num_labels", "problem_type"),
    }
)

_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_EXPERT_FIELDS = (
    *("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
    *("n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob"),
)
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


def config_path(folder_or_file: str | Path) -> Path:
    """The ``config.json`` that a folder or a file names.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a model folder (with a {CONFIG_NAME}) or the file itself")
    return path


def load_config(folder_or_file: str | Path) -> dict[str, Any]:
    """The JSON object of a ``config.json``, unread.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    path = config_path(folder_or_file)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, not a JSON object; this is no model configuration")
    return config


def read_config(folder_or_file: str | Path) -> ModelSpec:
    """The spec of the model in a folder, or in a ``config.json`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a missing field, one of a wrong type, or one that asks for what is not supported; the message names
            the file, the field and its value.
    """
    return parse_config(load_config(folder_or_file), str(config_path(folder_or_file)))


def parse_config(config: Mapping[str, Any], source: str = CONFIG_NAME) -> ModelSpec:
    """The spec that a parsed ``config.json`` describes; ``source`` names it in errors.

    ``quantization_config`` is checked here and handed out by
    :func:`abyssal.spec.hf_quantization.read_quantization`.

    Raises:
        ValueError: as :func:`read_config`.
    """
    try:
        return _read_spec(Fields(config, source))
    except FieldError:
        raise
    except ValueError as error:  # fields that are well-formed each, but contradict one another
        raise ValueError(f"{source}: {error}") from None


def _read_spec(fields: Fields) -> ModelSpec:
    family = fields.take("model_type")
    if family not in FAMILIES:
        raise fields.error("model_type", f"supported are {', '.join(FAMILIES)}")
    _check_fixed(fields)
    parse_quantization(fields)
    rope_theta, yarn = read_rope(fields)
    num_layers, mtp_depth = fields.integer("num_hidden_layers"), _read_mtp_depth(fields)
    moe, num_dense_layers = (None, 0) if family == "llama" else _read_moe(fields, family, num_layers + mtp_depth)
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": num_layers,
        "dense_ffn_size": fields.integer("intermediate_size"),
        "attention": _read_grouped_attention(fields) if family == "llama" else _read_latent_attention(fields),
        "moe": moe,
        "num_dense_layers": num_dense_layers,
        "mtp_depth": mtp_depth,
        "max_positions": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "yarn": yarn,
        "rope_interleaved": _read_rope_layout(fields, family),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "init_std": fields.number("initializer_range", 0.02),
        "bos_token_id": fields.integer("bos_token_id", None),
        "eos_token_id": _read_eos(fields),
        "pad_token_id": fields.integer("pad_token_id", None),
    }
    fields.finish(HARMLESS)
    return ModelSpec(**values)


def _check_fixed(fields: Fields) -> None:
    fields.only("hidden_act", "silu", "the FFNs are SwiGLU")
    fields.only("attention_bias", False, "the projections of attention have no biases")
    fields.only("mlp_bias", False, "the FFNs have no biases")
    fields.only("attention_dropout", 0, "attention has no dropout")
    fields.only("is_encoder_decoder", False, "the models are decoders")


def _read_mtp_depth(fields: Fields) -> int:
    """MTP modules; absent means none, as in files of transformers 4, whose DeepSeek models had none."""
    depths = {fields.integer(name, None) for name in ("num_nextn_predict_layers", "num_mtp_layers")} - {None}
    if len(depths) > 1:
        raise fields.error("num_mtp_layers", "it contradicts num_nextn_predict_layers; keep one of the two")
    return depths.pop() if depths else 0


def _read_eos(fields: Fields) -> int | tuple[int, ...] | None:
    value = fields.take("eos_token_id", None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise fields.error("eos_token_id", "it must be an integer or a list of integers")
    return tuple(value) if isinstance(value, list) else value


def _read_rope_layout(fields: Fields, family: str) -> bool:
    if family == "deepseek_v3":
        return fields.flag("rope_interleave", True)
    fields.only("rope_interleave", family == "deepseek_v2", f"{family} has one layout of rotary dimensions")
    return family == "deepseek_v2"


def _read_latent_attention(fields: Fields) -> LatentAttentionSpec:
    attention = LatentAttentionSpec(
        num_heads=fields.integer("num_attention_heads"),
        q_lora_rank=fields.nullable_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    fields.only("num_key_value_heads", attention.num_heads, "latent attention has a key for every head")
    fields.only("head_dim", attention.qk_rope_head_dim, "it is another name of qk_rope_head_dim")
    fields.only("qk_head_dim", attention.qk_head_dim, "it is qk_nope_head_dim + qk_rope_head_dim")
    return attention


def _read_grouped_attention(fields: Fields) -> GroupedQueryAttentionSpec:
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if not fields.given("head_dim") and (num_heads < 1 or hidden_size % num_heads):
        raise fields.error("head_dim", f"hidden_size {hidden_size} is no multiple of {num_heads} heads; state it")
    return GroupedQueryAttentionSpec(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // max(num_heads, 1)),
    )


def _read_moe(fields: Fields, family: str, num_blocks: int) -> tuple[MoESpec | None, int]:
    """(experts, leading dense layers) of a model of ``num_blocks`` blocks, those of MTP modules included."""
    fields.only("moe_layer_freq", 1, "every layer after the dense ones has experts")
    num_dense_layers = fields.integer("first_k_dense_replace", None)
    num_experts = _read_num_experts(fields)
    if (num_experts is None and num_dense_layers is None) or (
        num_dense_layers is not None and num_dense_layers >= num_blocks
    ):
        for name in _EXPERT_FIELDS:  # no block has experts, whatever these say
            fields.take(name, None)
        return None, 0
    if num_experts is None:
        raise fields.error("n_routed_experts", f"only {num_dense_layers} layers are dense; state it")
    if num_dense_layers is None:
        raise fields.error("first_k_dense_replace", "state how many leading layers are dense (0 if none)")
    read_gate = _read_sigmoid_gate if family == "deepseek_v3" else _read_softmax_gate
    moe = MoESpec(
        num_experts=num_experts,
        num_shared_experts=fields.integer("n_shared_experts", 0),
        top_k=fields.integer("num_experts_per_tok"),
        expert_ffn_size=fields.integer("moe_intermediate_size"),
        route_scale=fields.number("routed_scaling_factor"),
        **read_gate(fields),
    )
    return moe, num_dense_layers


def _read_num_experts(fields: Fields) -> int | None:
    """``n_routed_experts`` or one of the two names that transformers gives it as well."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    counts = {fields.integer(name, None) for name in names} - {None}
    if len(counts) > 1:
        raise fields.error("n_routed_experts", "it contradicts num_local_experts or num_experts; keep one")
    return counts.pop() if counts else None


def _read_sigmoid_gate(fields: Fields) -> dict[str, Any]:
    fields.only("scoring_func", "sigmoid", "deepseek_v3 has a sigmoid gate")
    fields.only("topk_method", "noaux_tc", "deepseek_v3 chooses by score plus correction bias")
    return {
        "num_groups": fields.integer("n_group"),
        "num_kept_groups": fields.integer("topk_group"),
        "scoring": "sigmoid",
        "renormalise": fields.flag("norm_topk_prob", True),
        "correction_bias": True,
    }


def _read_softmax_gate(fields: Fields) -> dict[str, Any]:
    fields.only("scoring_func", "softmax", "deepseek_v2 has a softmax gate")
    # DeepSeek's code renormalises then *instead of* scaling, transformers ignores the field: no reading is safe.
    fields.only("norm_topk_prob", False, "readers of deepseek_v2 disagree about what true means")
    method = fields.take("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.error("topk_method", "deepseek_v2 has 'greedy' and 'group_limited_greedy'")
    greedy = method == "greedy"
    # Without a limit on groups their number means nothing, whatever the file says.
    num_groups = fields.integer("n_group", 1) if greedy else fields.integer("n_group")
    num_kept_groups = fields.integer("topk_group", 1) if greedy else fields.integer("topk_group")
    return {
        "num_groups": 1 if greedy else num_groups,
        "num_kept_groups": 1 if greedy else num_kept_groups,
        "scoring": "softmax",
        "renormalise": False,
        "correction_bias": False,
    }


def check_writable(spec: ModelSpec) -> None:
    """Raise ValueError naming the first thing about ``spec`` that its family's ``config.json`` cannot say.

    A trainer calls this before its first step, so that no run ends with a model that cannot be saved.
    """
    hidden, heads = spec.hidden_size, spec.attention.num_heads
    if spec.family != "deepseek_v3" and hidden % heads:
        raise ValueError(f"spec.hidden_size is {hidden}: transformers wants a multiple of {heads} heads; change either")
    if spec.moe is None:
        return
    if spec.family == "deepseek_v3":
        wanted = {"scoring": "sigmoid", "correction_bias": True}
    else:
        wanted = {"scoring": "softmax", "correction_bias": False, "renormalise": False}
    for name, value in wanted.items():
        if getattr(spec.moe, name) != value:
            raise ValueError(
                f"spec.moe.{name} is {getattr(spec.moe, name)!r}: a {spec.family} config.json cannot say so, "
                f"set it to {value!r} or choose another family"
            )


def write_config(
    spec: ModelSpec,
    dtype: str = "bfloat16",
    quantization: Literal["fp8"] | BlockQuantization | None = None,
    include_mtp: bool = True,
) -> dict[str, Any]:
    """The ``config.json`` of ``spec``: what :func:`parse_config`, transformers and the serving engines read.

    ``dtype`` is "bfloat16" or "float32" (or "bf16", "fp32"): the dtype of weights that are not quantised.  Without
    ``include_mtp`` the file describes the main model alone.

    Raises:
        ValueError: the family's format cannot express the spec (see :func:`check_writable`), or an unknown dtype.
    """
    check_writable(spec)
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}: choose bfloat16 or float32 (for FP8 weights, quantization='fp8' as well)"
        )
    eos = list(spec.eos_token_id) if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "torch_dtype": _DTYPES[dtype],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "intermediate_size": spec.dense_ffn_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_token_id,
    }
    config |= write_rope(spec.rope_theta, spec.yarn) | _write_attention(spec.attention)
    if spec.family != "llama":
        config |= _write_moe(spec)
    if spec.family == "deepseek_v3":
        config["num_nextn_predict_layers"] = spec.mtp_depth if include_mtp else 0
        config["rope_interleave"] = spec.rope_interleaved
    if quantization is not None:
        chosen = BlockQuantization() if quantization == "fp8" else quantization
        config["quantization_config"] = write_quantization(chosen)
    return config


def _write_attention(attention: LatentAttentionSpec | GroupedQueryAttentionSpec) -> dict[str, Any]:
    if isinstance(attention, GroupedQueryAttentionSpec):
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "mlp_bias": False,
        }
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
    }


def _write_moe(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        # Readers take layers from first_k_dense_replace on, MTP blocks too, to have experts: put it past them all.
        return {"first_k_dense_replace": spec.num_layers + spec.mtp_depth}
    sigmoid = moe.scoring == "sigmoid"
    greedy = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {
        "first_k_dense_replace": spec.num_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn_size,
        "n_group": moe.num_groups,
        "topk_group": moe.num_kept_groups,
        "scoring_func": moe.scoring,
        "topk_method": "noaux_tc" if sigmoid else greedy,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.route_scale,
        "ep_size": 1,
    }
