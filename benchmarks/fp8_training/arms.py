"""What is compared: one model, trained in BF16, in FP8, and in FP8 with one thing otherwise than the paper's recipe.

The model has DeepSeek-V3's architecture with inner dimensions of 256 to 1536, so that every product sums over at least
two tiles of 128; but for its few layers and experts it is the preset ``small``.

Arms of one seed have the same rows in the same order and the same initial weights.  Two of them are yardsticks:
``bf16-halves`` does what BF16 does and adds up a step's two sequences apart, so that nothing but rounding differs, and
``float32`` rounds less.

The peak learning rate is low because rounding alone must not move the loss more than a format does.  At 2e-3
``bf16-halves`` moved that of the last 200 of 600 steps by 1.0 % (one seed).  At 5e-4 it moved it by 0.32 % and FP8 by
0.33 % (one seed), both the same way and in the same places: what was seen there was the BF16 run's luck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from abyssal.precision.recipe import Fp8Options
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.train.config import CheckpointConfig, OptimizerConfig, TrainConfig, width_init_std

WIDTH = 512
MODEL = ModelSpec(
    family="deepseek_v3",
    vocab_size=2048,  # the tokenizer's later
    hidden_size=WIDTH,
    num_layers=3,
    dense_ffn_size=1536,
    attention=LatentAttentionSpec(
        num_heads=8, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoESpec(num_experts=8, num_shared_experts=1, top_k=2, expert_ffn_size=256, route_scale=2.5),
    num_dense_layers=1,
    mtp_depth=0,
    init_std=width_init_std(WIDTH),
)


@dataclass(frozen=True)
class Arm:
    """One way to train, run once a seed."""

    name: str
    """Of its runs' folder."""
    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of :class:`TrainConfig`, where they are not the scale's."""


def _fp8(name: str, label: str, options: Fp8Options | None = None) -> Arm:
    return Arm(name, label, {"precision": "fp8", "fp8": options or Fp8Options()})


BASE = Arm("bf16", "BF16")
FP8 = _fp8("fp8", "FP8")
HALVES = Arm("bf16-halves", "BF16, added up otherwise", {"micro_batch_size": 1})
ARMS = {
    arm.name: arm
    for arm in (
        BASE,
        FP8,
        HALVES,
        Arm("float32", "FP32", {"compute": "float32"}),
        _fp8("fp8-fp32-scales", "FP8, FP32 scales", Fp8Options(scales="float32")),
        _fp8("fp8-e5m2-gradients", "FP8, gradients in E5M2", Fp8Options(gradients="e5m2")),
        _fp8("fp8-block-gradients", "FP8, gradients by 128 x 128", Fp8Options(gradient_tile="128x128")),
        _fp8("fp8-tensor-scales", "FP8, one scale a tensor", Fp8Options(granularity="tensor")),
        _fp8("fp8-promoted", "FP8, 14 bits, promoted", Fp8Options(accumulation="promoted")),
        _fp8("fp8-tensor-core", "FP8, 14 bits", Fp8Options(accumulation="tensor_core")),
    )
}
DEFAULT = (BASE.name, FP8.name)


@dataclass(frozen=True)
class Scale:
    """How long every run is."""

    steps: int
    last: int
    """Steps at the end whose losses are compared."""
    window: int
    """Steps whose mean is a point of a curve."""
    seq_len: int
    batch_size: int
    vocab_size: int
    held_out_batches: int
    """Of every validation, the last too."""
    save_every: int = 100
    learning_rate: float = 2.5e-4

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """The run of an arm at a seed."""
        fields: dict[str, Any] = {
            "steps": self.steps,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": seed,
            "compute": "bfloat16",
            "validate_every": max(1, self.steps // 3),
            "validation_batches": self.held_out_batches,
            "optimizer": OptimizerConfig(lr=self.learning_rate, warmup_steps=50, lr_schedule="cosine:1:0.1"),
            "checkpoint": CheckpointConfig(save_every=self.save_every, keep=1),
        }
        return TrainConfig(**{**fields, **arm.fields})


FULL = Scale(steps=600, last=200, window=10, seq_len=256, batch_size=2, vocab_size=2048, held_out_batches=32)
SMOKE = Scale(steps=6, last=3, window=1, seq_len=32, batch_size=2, vocab_size=320, held_out_batches=1, save_every=3)
