"""The parts that a :class:`~abyssal.spec.model.ModelSpec` is put together from: attention, experts, position scaling.

Each is a frozen record that checks itself when it is built, so an impossible model fails at the line that describes
it, with the field's name, and never as a shape error in the middle of a matrix product.  Free of torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from abyssal.spec.fp8_entry import Fp8Entry


def check_at_least(record: str, minimum: int, **fields: int) -> None:
    """Raise ValueError naming the first of ``fields`` that is not an integer of at least ``minimum``."""
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{record}.{name} is {value!r}: set it to an integer of at least {minimum}")


def check_positive(record: str, **fields: float) -> None:
    """Raise ValueError naming the first of ``fields`` that is not a finite number above zero."""
    for name, value in fields.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{record}.{name} is {value!r}: set it to a number above 0")


def check_even(record: str, **fields: int) -> None:
    """Raise ValueError naming the first of ``fields`` that cannot be split into rotated pairs."""
    for name, value in fields.items():
        if value % 2:
            raise ValueError(f"{record}.{name} is {value}: rotary positions turn pairs, set it to an even number")


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
    """Scale of cos and sin: m(mscale) / m(mscale_all_dim) where m(x) = 0.1 x ln(factor) + 1; m(1) without the two."""
    mscale_all_dim: float | None = None
    """The softmax scale of MLA is multiplied by m(mscale_all_dim) squared."""

    def __post_init__(self) -> None:
        check_positive("yarn", factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        check_at_least("yarn", 1, original_max_positions=self.original_max_positions)
        if self.factor < 1:
            raise ValueError(f"yarn.factor is {self.factor}: YaRN only lengthens, set it to 1 or more")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"yarn.beta_fast is {self.beta_fast}, not above yarn.beta_slow {self.beta_slow}: "
                "the usual pair is 32 and 1"
            )
        # With one of the two, DeepSeek's own code and transformers compute different scales.
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"yarn.mscale is {self.mscale} and yarn.mscale_all_dim is {self.mscale_all_dim}: "
                "set both (1.0 and 1.0 in DeepSeek-V3) or neither"
            )
        if self.mscale is not None and self.mscale_all_dim is not None:
            check_positive("yarn", mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)


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

    def __post_init__(self) -> None:
        check_at_least(
            "attention",
            1,
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        if self.q_lora_rank is not None:
            check_at_least("attention", 1, q_lora_rank=self.q_lora_rank)
        check_even("attention", qk_rope_head_dim=self.qk_rope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_values(self) -> int:
        """Values cached a token a layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def fp8_entry(self) -> Fp8Entry:
        """The same in FP8: the latent as codes, the rotary key plain."""
        return Fp8Entry(1, self.kv_lora_rank, self.qk_rope_head_dim)

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def score_dims(self) -> int:
        """Width of the score and of the value product of one head, for FLOP counts."""
        return self.qk_head_dim + self.v_head_dim

    @property
    def absorbed_score_dims(self) -> int:
        """The same in the absorbed form, where scores and values are both taken over the latent."""
        return self.cache_values + self.kv_lora_rank


@dataclass(frozen=True)
class GroupedQueryAttentionSpec:
    """Grouped-query attention of the dense family; multi-head attention when ``num_kv_heads == num_heads``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_at_least("attention", 1, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        check_even("attention", head_dim=self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"attention.num_kv_heads is {self.num_kv_heads}: set it to a divisor of num_heads ({self.num_heads})"
            )

    @property
    def cache_values(self) -> int:
        """Values cached a token a layer: keys and values of every key-value head."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def fp8_entry(self) -> Fp8Entry:
        """The same in FP8: each head's key and each head's value by scales of its own."""
        return Fp8Entry(2 * self.num_kv_heads, self.head_dim)

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

    def __post_init__(self) -> None:
        check_at_least(
            "moe",
            1,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_ffn_size=self.expert_ffn_size,
            num_groups=self.num_groups,
            num_kept_groups=self.num_kept_groups,
        )
        check_at_least("moe", 0, num_shared_experts=self.num_shared_experts)
        check_positive("moe", route_scale=self.route_scale)
        if self.scoring not in ("sigmoid", "softmax"):
            raise ValueError(f"moe.scoring is {self.scoring!r}: set it to 'sigmoid' (V3) or 'softmax' (V2)")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(f"moe.num_groups is {self.num_groups}: set it to a divisor of {self.num_experts} experts")
        if self.num_kept_groups > self.num_groups:
            raise ValueError(
                f"moe.num_kept_groups is {self.num_kept_groups}: set it to at most num_groups ({self.num_groups})"
            )
        experts_per_group = self.num_experts // self.num_groups
        if self.top_k > self.num_kept_groups * experts_per_group:
            raise ValueError(
                f"moe.top_k is {self.top_k}, but {self.num_kept_groups} kept groups hold only "
                f"{self.num_kept_groups * experts_per_group} experts: lower top_k or raise num_kept_groups"
            )
        if self.scoring == "sigmoid" and experts_per_group < 2:
            raise ValueError(
                f"moe.num_groups is {self.num_groups}, one expert a group, but a sigmoid gate scores a group by its "
                "two best: lower num_groups"
            )
