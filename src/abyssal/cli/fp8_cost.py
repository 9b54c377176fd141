"""What training in FP8 costs on this machine: whole steps of a small model, in BF16 and in FP8, one after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from abyssal.data.batch import Batch
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.train.config import TrainConfig
from abyssal.train.loop import build_model
from abyssal.train.step import Trainer

REPEATS = 3
"""Timed steps of each, after one to warm up."""
SEQ_LEN = 256
MODEL = ModelSpec(
    family="deepseek_v3",
    vocab_size=512,
    hidden_size=512,
    num_layers=2,
    dense_ffn_size=1024,
    attention=LatentAttentionSpec(
        num_heads=4, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoESpec(num_experts=4, num_shared_experts=1, top_k=2, expert_ffn_size=256),
    num_dense_layers=1,
    mtp_depth=0,
)
"""Every kind of product, at widths of the small models that a CPU trains."""


@dataclass(frozen=True)
class Fp8Cost:
    """Seconds a step, each the least seen: what else the machine does makes a step slower and never faster."""

    bf16_seconds: float
    fp8_seconds: float

    @property
    def ratio(self) -> float:
        return self.fp8_seconds / self.bf16_seconds


def measure() -> Fp8Cost:
    """Train a few steps; a second or two."""
    trainers = [_trainer("compute"), _trainer("fp8")]
    tokens_BX = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, SEQ_LEN + 1))
    seconds: list[list[float]] = [[], []]
    for repeat in range(REPEATS + 1):
        for trainer, found in zip(trainers, seconds, strict=True):
            begin = time.perf_counter()
            trainer.step(Batch(tokens_BX))
            if repeat:
                found.append(time.perf_counter() - begin)
    return Fp8Cost(*map(min, seconds))


def _trainer(precision: str) -> Trainer:
    config = TrainConfig(
        steps=REPEATS + 1,
        seq_len=SEQ_LEN,
        batch_size=1,
        compute="bfloat16",
        precision=precision,  # pyright: ignore[reportArgumentType]
    )
    return Trainer(build_model(MODEL, config), config)
