"""Random small models, for property tests: every family, with and without each of its options."""

from __future__ import annotations

from hypothesis import strategies as st

from abyssal.spec.model import (
    FAMILIES,
    Family,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    MoESpec,
    YarnSpec,
)


@st.composite
def yarns(draw: st.DrawFn) -> YarnSpec:
    with_mscale = draw(st.booleans())
    return YarnSpec(
        factor=draw(st.sampled_from([1.0, 2.5, 40.0])),
        original_max_positions=draw(st.integers(8, 64)),
        beta_fast=draw(st.sampled_from([32.0, 16.0])),
        mscale=draw(st.sampled_from([1.0, 0.707])) if with_mscale else None,
        mscale_all_dim=draw(st.sampled_from([1.0, 0.707])) if with_mscale else None,
    )


@st.composite
def latent_attentions(draw: st.DrawFn, num_heads: int) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        num_heads=num_heads,
        q_lora_rank=draw(st.none() | st.integers(1, 40)),
        kv_lora_rank=draw(st.integers(1, 40)),
        qk_nope_head_dim=draw(st.integers(1, 24)),
        qk_rope_head_dim=2 * draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(1, 24)),
    )


@st.composite
def grouped_attentions(draw: st.DrawFn, num_heads: int) -> GroupedQueryAttentionSpec:
    divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
    return GroupedQueryAttentionSpec(num_heads, draw(st.sampled_from(divisors)), 2 * draw(st.integers(1, 16)))


@st.composite
def gates(draw: st.DrawFn, family: Family) -> MoESpec:
    """Experts whose gate the family's config.json can express."""
    sigmoid = family == "deepseek_v3"
    num_groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    # Plain greedy routing has one group: the number of groups means nothing to it.
    num_kept_groups = draw(st.integers(1, num_groups))
    return MoESpec(
        num_experts=num_groups * per_group,
        num_shared_experts=draw(st.integers(0, 2)),
        top_k=draw(st.integers(1, num_kept_groups * per_group)),
        expert_ffn_size=draw(st.integers(1, 40)),
        num_groups=num_groups,
        num_kept_groups=num_kept_groups,
        scoring="sigmoid" if sigmoid else "softmax",
        renormalise=draw(st.booleans()) if sigmoid else False,
        route_scale=draw(st.sampled_from([1.0, 2.5, 16.0])),
        correction_bias=sigmoid,
    )


@st.composite
def specs(draw: st.DrawFn, families: tuple[Family, ...] = FAMILIES) -> ModelSpec:
    """Any small model that can be saved."""
    family = draw(st.sampled_from(families))
    num_heads = draw(st.integers(1, 6))
    moe = draw(st.none() | gates(family)) if family != "llama" else None
    num_layers, vocab_size = draw(st.integers(1, 4)), draw(st.integers(3, 90))
    tokens = st.integers(0, vocab_size - 1)
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=num_heads * draw(st.integers(1, 12)),
        num_layers=num_layers,
        dense_ffn_size=draw(st.integers(1, 60)),
        attention=draw(grouped_attentions(num_heads) if family == "llama" else latent_attentions(num_heads)),
        moe=moe,
        num_dense_layers=draw(st.integers(0, num_layers - 1)) if moe is not None else 0,
        mtp_depth=draw(st.integers(0, 2)) if family == "deepseek_v3" else 0,
        max_positions=draw(st.integers(1, 200)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        yarn=draw(st.none() | yarns()),
        rope_interleaved={"llama": False, "deepseek_v2": True}.get(family, draw(st.booleans())),
        tie_embeddings=draw(st.booleans()),
        init_std=draw(st.sampled_from([0.006, 0.02])),
        bos_token_id=draw(st.none() | tokens),
        eos_token_id=draw(st.none() | tokens | st.lists(tokens, min_size=1, max_size=3).map(tuple)),
        pad_token_id=draw(st.none() | tokens),
    )
