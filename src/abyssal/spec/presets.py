"""The models that have a name: DeepSeek's published ones, and three small ones of the DeepSeek-V3 architecture.

Sizes, positions and token ids are those of the published ``config.json`` files.  ``init_std`` is the one the reports
trained with (0.006), where the published files carry transformers' default of 0.02: a preset is for training as well.
"""

from __future__ import annotations

from collections.abc import Callable

from abyssal.spec.model import GroupedQueryAttentionSpec, LatentAttentionSpec, ModelSpec, MoESpec, YarnSpec


def _deepseek_v3() -> ModelSpec:
    return ModelSpec(
        family="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        dense_ffn_size=18432,
        attention=LatentAttentionSpec(
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoESpec(
            num_experts=256,
            num_shared_experts=1,
            top_k=8,
            expert_ffn_size=2048,
            num_groups=8,
            num_kept_groups=4,
            route_scale=2.5,
        ),
        num_dense_layers=3,
        mtp_depth=1,
        max_positions=163840,
        yarn=YarnSpec(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0),
        bos_token_id=0,
        eos_token_id=1,
    )


def _deepseek_v2() -> ModelSpec:
    return ModelSpec(
        family="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        num_layers=60,
        dense_ffn_size=12288,
        attention=LatentAttentionSpec(
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoESpec(
            num_experts=160,
            num_shared_experts=2,
            top_k=6,
            expert_ffn_size=1536,
            num_groups=8,
            num_kept_groups=3,
            scoring="softmax",
            renormalise=False,
            route_scale=16.0,
            correction_bias=False,
        ),
        num_dense_layers=1,
        max_positions=163840,
        yarn=YarnSpec(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707),
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _deepseek_v2_lite() -> ModelSpec:
    return ModelSpec(
        family="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        dense_ffn_size=10944,
        attention=LatentAttentionSpec(
            num_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoESpec(
            num_experts=64,
            num_shared_experts=2,
            top_k=6,
            expert_ffn_size=1408,
            scoring="softmax",
            renormalise=False,
            correction_bias=False,
        ),
        num_dense_layers=1,
        max_positions=163840,
        yarn=YarnSpec(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707),
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _dense(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_size: int) -> ModelSpec:
    return ModelSpec(
        family="llama",
        vocab_size=102400,
        hidden_size=hidden_size,
        num_layers=num_layers,
        dense_ffn_size=ffn_size,
        attention=GroupedQueryAttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128),
        max_positions=4096,
        rope_interleaved=False,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def _deepseek_llm_7b() -> ModelSpec:
    return _dense(hidden_size=4096, num_layers=30, num_heads=32, num_kv_heads=32, ffn_size=11008)


def _deepseek_llm_67b() -> ModelSpec:
    return _dense(hidden_size=8192, num_layers=95, num_heads=64, num_kv_heads=8, ffn_size=22016)


def _small_v3(
    hidden_size: int,
    num_layers: int,
    dense_ffn_size: int,
    attention: LatentAttentionSpec,
    moe: MoESpec,
    vocab_size: int,
) -> ModelSpec:
    return ModelSpec(
        family="deepseek_v3",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        dense_ffn_size=dense_ffn_size,
        attention=attention,
        moe=moe,
        num_dense_layers=1,
        mtp_depth=1,
        max_positions=8192,
        bos_token_id=0,
        eos_token_id=1,
    )


def _small_moe(num_experts: int, expert_ffn_size: int, top_k: int = 4) -> MoESpec:
    return MoESpec(
        num_experts=num_experts,
        num_shared_experts=1,
        top_k=top_k,
        expert_ffn_size=expert_ffn_size,
        num_groups=4,
        num_kept_groups=2,
        route_scale=2.5,
    )


def _tiny() -> ModelSpec:
    attention = LatentAttentionSpec(
        num_heads=8, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    )
    return _small_v3(128, 4, 352, attention, _small_moe(16, 128), vocab_size=8192)


def _small() -> ModelSpec:
    attention = LatentAttentionSpec(
        num_heads=8, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    return _small_v3(512, 8, 1408, attention, _small_moe(32, 256), vocab_size=8192)


def _medium() -> ModelSpec:
    # V3's own head and latent widths, for which fused attention kernels are specialised.
    attention = LatentAttentionSpec(
        num_heads=8, q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    return _small_v3(1024, 16, 2816, attention, _small_moe(64, 320, top_k=8), vocab_size=16384)


PRESETS: dict[str, Callable[[], ModelSpec]] = {
    "deepseek-v3": _deepseek_v3,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-llm-7b": _deepseek_llm_7b,
    "deepseek-llm-67b": _deepseek_llm_67b,
    "deepseek-math-7b": _deepseek_llm_7b,
    "tiny": _tiny,
    "small": _small,
    "medium": _medium,
}


def preset(name: str) -> ModelSpec:
    """The spec of a named model.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
