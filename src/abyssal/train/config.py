"""What a training run is, as frozen records: the command line is made from them, and a run saves them resolved.

Free of torch, so that ``abyssal train --help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from abyssal.spec.model import ModelSpec
from abyssal.train.schedules import Decay, factor

Compute = Literal["float32", "bfloat16"]

BFLOAT16_WIDTH = 512
"""Hidden size from which BF16 compute is the default.  Measured on two AVX-512 cores with BF16 dot products: ``small``
(512 wide) trains 1.8 times as fast in BF16 as in FP32, ``tiny`` (128 wide) at 0.8 times the speed."""


def default_compute(hidden_size: int) -> Compute:
    """What trains faster at this width."""
    return "bfloat16" if hidden_size >= BFLOAT16_WIDTH else "float32"


def width_init_std(hidden_size: int) -> float:
    """Standard deviation of initial weights for a width: 0.5 / √D, which is V3's 0.006 at its 7168 and 0.022 at 512."""
    return 0.5 / math.sqrt(hidden_size)


def _check_range(config: object, least: float, most: float, *names: str) -> None:
    """Refuse fields outside ``least..most``, and NaN, by name."""
    for name in names:
        value = getattr(config, name)
        if not least <= value <= most:
            wanted = f"at least {least}" if math.isinf(most) else f"{least} to {most}"
            raise ValueError(f"{name} is {value}; give {wanted}")


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}; give a positive number")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate [V3 section 4.2].

    Raises:
        ValueError: a field out of its range, by name.
    """

    lr: float = 2e-3
    """Peak learning rate.  Small models want far more than V3's 2.2e-4."""
    warmup_steps: int = 50
    """Steps of linear warm-up; at most a tenth of the run is used."""
    decay: Decay = "cosine"
    """Shape of the decay after the warm-up and the plateau."""
    decay_start: float = 0.0
    """Share of the run at the peak before the decay."""
    lr_floor: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    beta1: float = 0.9
    """Memory of Adam's mean of gradients."""
    beta2: float = 0.95
    """Memory of Adam's mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    clip: float = 1.0
    """Largest global norm of the gradients."""

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "eps", "clip")
        _check_range(self, 0, math.inf, "warmup_steps", "weight_decay")
        _check_range(self, 0, 1, "decay_start", "lr_floor")
        _check_range(self, 0, 0.999999, "beta1", "beta2")

    def learning_rate(self, step: int, num_steps: int) -> float:
        """At ``step`` of ``num_steps``."""
        warmup_steps = min(self.warmup_steps, num_steps // 10)
        return self.lr * factor(step, num_steps, warmup_steps, self.decay, self.decay_start, self.lr_floor)


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing of the experts [V3 section 2.1.2].

    Raises:
        ValueError: a field out of its range, by name.
    """

    bias_speed: float = 1e-3
    """γ: how far a step moves an expert's correction bias.  V3's 0.001 is for runs of many thousand steps."""
    bias_decay: Decay = "constant"
    """Shape of γ's decay to 0 over the run."""
    bias_freeze: float = 0.034
    """Share of the run at whose end γ is 0 (V3: the last 500B of 14.8T tokens)."""
    balance_alpha: float = 1e-4
    """α of the sequence-wise balance loss; 0 leaves it out."""

    def __post_init__(self) -> None:
        _check_range(self, 0, math.inf, "bias_speed", "balance_alpha")
        _check_range(self, 0, 1, "bias_freeze")

    def speed(self, step: int, num_steps: int) -> float:
        """γ at ``step`` of ``num_steps``."""
        moving = num_steps - round(self.bias_freeze * num_steps)
        return self.bias_speed * factor(step, moving, kind=self.bias_decay) if step < moving else 0.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run of a model on a stream of tokens.

    Raises:
        ValueError: a field out of its range, by name.
    """

    steps: int = 1000
    """Optimizer steps."""
    seq_len: int = 256
    """Tokens of a sequence."""
    batch_size: int = 8
    """Sequences of a step (the global batch)."""
    micro_batch_size: int | None = None
    """Sequences of one forward and backward pass; the step's gradients are accumulated.  None takes the whole batch."""
    seed: int = 0
    """Of initial weights and of the order of the data."""
    compute: Compute | None = None
    """Dtype of activations and of the matrix products; parameters and optimizer are FP32 either way. None takes
    bfloat16 from a hidden size of 512 on, and float32 below, where casting costs more than products gain."""
    mtp_weight: float = 0.3
    """λ of the multi-token-prediction loss."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    validation_batches: int = 8
    """Batches of held-out text at each validation but the last, which takes all of it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        _check_range(self, 1, math.inf, "steps", "seq_len", "batch_size", "validate_every", "validation_batches")
        _check_range(self, 0, math.inf, "mtp_weight")
        _check_range(self, 0, (1 << 63) - 1, "seed")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, which does not divide batch_size {self.batch_size}; "
                "give a divisor"
            )

    def resolved(self, spec: ModelSpec) -> TrainConfig:
        """Everything that was left to the model's size, decided: ``compute``."""
        return replace(self, compute=self.compute or default_compute(spec.hidden_size))

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of a step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuse sequences that the model has no positions for.

        Raises:
            ValueError: ``seq_len`` past ``max_positions``.
        """
        if self.seq_len > spec.max_positions:
            raise ValueError(
                f"seq_len is {self.seq_len}, past the model's max_positions {spec.max_positions}; "
                "give a shorter seq_len"
            )
