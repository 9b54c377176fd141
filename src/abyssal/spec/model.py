"""What a DeepSeek-class language model is, as facts: sizes, gates, positions.

One frozen record describes every family that this package runs: DeepSeek-V3/R1, DeepSeek-V2, and the dense
DeepSeek LLM / DeepSeekMath (Llama layout).  A family is a value of this record, never a class of its own, so the
model, the checkpoint reader, the planner and the arithmetic all read the same fields.  Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["deepseek_v3", "deepseek_v2", "llama"]

LATENT_NORM_EPS = 1e-6
"""Epsilon of the RMSNorm on the query and key-value latents.  Published checkpoints were trained with 1e-6 there,
whatever their ``rms_norm_eps`` says."""


@dataclass(frozen=True)
class YarnSpec:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071) as DeepSeek's checkpoints configure it."""

    factor: float
    """Extended length over original length (s)."""
    original_max_positions: int
    """Length in tokens of the training before the extension."""
    beta_fast: float = 32.0
    """Rotations over the original length above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by ``factor``."""
    mscale: float | None = None
    """Scale of cos and sin: m(mscale) / m(mscale_all_dim) where m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: float | None = None
    """The softmax scale of MLA is multiplied by m(mscale_all_dim) squared."""


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (MLA), DeepSeek-V3 report section 2.1.1."""

    num_heads: int
    q_lora_rank: int | None
    """Width of the query latent; None projects queries straight from the hidden state (V2-Lite)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_values(self) -> int:
        """Values cached a token a layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def score_dims(self) -> int:
        """Width of the score and of the value product of one head, for FLOP counts."""
        return self.qk_head_dim + self.v_head_dim


@dataclass(frozen=True)
class GroupedQueryAttentionSpec:
    """Grouped-query attention of the dense family; multi-head attention when ``num_kv_heads == num_heads``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def cache_values(self) -> int:
        """Values cached a token a layer: keys and values of every key-value head."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def score_dims(self) -> int:
        """Width of the score and of the value product of one head, for FLOP counts."""
        return 2 * self.head_dim


@dataclass(frozen=True)
class MoESpec:
    """DeepSeekMoE (arXiv 2401.06066; V3 report section 2.1.2)."""

    num_experts: int
    """Routed experts (N_r)."""
    num_shared_experts: int
    """Shared experts (N_s); they are stored as one FFN of ``num_shared_experts * expert_ffn_size``."""
    top_k: int
    """Experts chosen a token (K_r)."""
    expert_ffn_size: int
    num_groups: int = 1
    num_kept_groups: int = 1
    """Groups that a token's experts may come from."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """Sigmoid gates score a group by the sum of its two best (V3), softmax gates by its best (V2)."""
    renormalise: bool = True
    """Divide the chosen scores by their sum before ``route_scale``."""
    route_scale: float = 1.0
    correction_bias: bool = True
    """A bias a expert that is added for the choice alone (auxiliary-loss-free balancing)."""


@dataclass(frozen=True)
class ModelSpec:
    """One model.  Build from :func:`abyssal.preset`, a ``config.json``, or directly.

    Raises:
        ValueError: a field that contradicts another, by name, with the fix.
    """

    family: Family
    """``model_type`` of the Hugging Face configuration."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    dense_ffn_size: int
    attention: LatentAttentionSpec | GroupedQueryAttentionSpec
    moe: MoESpec | None = None
    num_dense_layers: int = 0
    """Leading layers with a dense FFN; without ``moe`` every layer is dense."""
    mtp_depth: int = 0
    """Multi-token-prediction modules after the main model."""
    max_positions: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnSpec | None = None
    rope_interleaved: bool = True
    """MLA checkpoints rotate pairs (0,1), (2,3), ...; the Llama layout rotates halves."""
    tie_embeddings: bool = False
    init_std: float = 0.006
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
