"""What a training run is, as frozen records: the command line is made from them, and a run saves them resolved.

Free of torch, so that ``abyssal train --help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from abyssal.precision.recipe import NEVER_FP8, Fp8Options, Recomputed, products_of
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.model import ModelSpec
from abyssal.train.plan import RunPlan, plan_run
from abyssal.train.schedules import (
    BATCH_SIZES,
    BIAS_SPEEDS,
    LEARNING_RATES,
    MTP_WEIGHTS,
    Schedule,
    parse_schedule,
    warmup,
)

Compute = Literal["float32", "bfloat16", "float64"]
Moments = Literal["float32", "bfloat16"]
ModelFormat = Literal["fp32", "bf16", "fp8"]
DispatchKind = Literal["alltoall", "hierarchical", "deepep"]
ScheduleName = Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]

BFLOAT16_WIDTH = 512
"""Hidden size from which BF16 compute is the default.  Measured on two AVX-512 cores with BF16 dot products: ``small``
(512 wide) trains 1.8 times as fast in BF16 as in FP32, ``tiny`` (128 wide) at 0.8 times the speed."""
DEFAULT_STEPS = 1000


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
    lr_schedule: str = "cosine"
    """Factor on lr after the warm-up: constant, linear, cosine (to a tenth), v3, v2, llm, or phases of your own such as
    'constant:0.8:1 cosine:1:0.1' (shape, share of the run at which it ends, factor there)."""
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
    moments: Moments = "float32"
    """Dtype in which Adam's two means are kept; bfloat16 halves their memory [V3 section 3.3.3]."""
    largest_norm: float = 1e6
    """A gradient norm above it stops the run, as one that is not finite does."""

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "eps", "clip", "largest_norm")
        _check_range(self, 0, math.inf, "warmup_steps", "weight_decay")
        _check_range(self, 0, 0.999999, "beta1", "beta2")
        self.schedule()

    def schedule(self) -> Schedule:
        return parse_schedule("lr_schedule", self.lr_schedule, LEARNING_RATES)

    def learning_rate(self, step: int, num_steps: int, share: float) -> float:
        """At ``step`` of ``num_steps``, with ``share`` of the run done."""
        return self.lr * warmup(step, min(self.warmup_steps, num_steps // 10)) * self.schedule()(share)


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing of the experts: without a loss [V3 section 2.1.2], and by losses.

    Raises:
        ValueError: a field out of its range, by name.
    """

    bias_speed: float = 1e-3
    """γ: how far a step moves an expert's correction bias; 0 leaves it alone. V3's 0.001 is for runs of many thousand
    steps."""
    bias_schedule: str = "v3"
    """Factor on γ over the run: constant, v3 (0 in the last thirtieth), linear, or phases as in lr_schedule."""
    sequence_alpha: float = 1e-4
    """Sequence-wise balance loss [V3 eq. 17–20]."""
    batch_alpha: float = 0.0
    """The same over the tokens of a whole micro-batch [V3 section 4.5.3]."""
    expert_alpha: float = 0.0
    """V2's expert-level balance loss [V2 eq. 23–25; 0.003 there]."""
    device_alpha: float = 0.0
    """V2's device-level balance loss [V2 eq. 26–28; 0.05 there]."""
    communication_alpha: float = 0.0
    """V2's communication balance loss [V2 eq. 29–31; 0.02 there]."""
    alarm_steps: int = 100
    """Steps without a fiftieth of its share after which a starved expert is reported; 0 never reports."""

    def __post_init__(self) -> None:
        names = ("bias_speed", "sequence_alpha", "batch_alpha", "expert_alpha", "device_alpha", "communication_alpha")
        _check_range(self, 0, math.inf, *names, "alarm_steps")
        self.schedule()

    def schedule(self) -> Schedule:
        return parse_schedule("bias_schedule", self.bias_schedule, BIAS_SPEEDS)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run's whole state is saved; changing it changes no number.

    Raises:
        ValueError: a field out of its range, by name.
    """

    save_every: int = 500
    """Steps between checkpoints, written while training goes on; the last step has one too. 0 saves none."""
    keep: int = 2
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        _check_range(self, 0, math.inf, "save_every")
        _check_range(self, 1, math.inf, "keep")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over ranks (torchrun starts them); changing it changes no number but for rounding.

    Raises:
        ValueError: a field out of its range, by name, or a mesh that is none.
    """

    mesh: str | None = None
    """Axes and their sizes, such as dp=4,ep=4: data-parallel ranks, and those of them that share one copy of the
    experts. By default dp is the number of ranks started and ep is 1."""
    ranks_per_node: int | None = None
    """Ranks with fast links between them; as many as torchrun starts on a machine by default."""
    dispatch: DispatchKind = "alltoall"
    """How tokens reach experts: alltoall sends a copy to each chosen expert; hierarchical one to each node and on from
    there; deepep is NVIDIA GPUs' own, if installed."""
    dispatch_chunk: int | None = None
    """Tokens that cross between nodes at once with hierarchical dispatch; found by measurement by default."""
    schedule: ScheduleName = "dualpipe"
    """Order of work in a pipeline (pp above 1): dualpipe and dualpipev hide communication behind computation; abyssal
    schedule draws them."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each pipeline stage; as many in each by default."""
    redundant_experts: int = 0
    """Slots of each layer beyond one an expert, for copies of the busiest."""
    rebalance_every: int = 0
    """Steps after which experts are placed anew by the loads since; 0 leaves them where they are."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life, or of progress, from a rank after which all ranks end."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: one GPU a rank, and NCCL between them."""

    def __post_init__(self) -> None:
        _check_range(self, 0, math.inf, "redundant_experts", "rebalance_every")
        _check_range(self, 1, math.inf, *(n for n in ("ranks_per_node", "dispatch_chunk") if getattr(self, n)))
        _check_positive(self, "rank_timeout")
        if self.dispatch not in get_args(DispatchKind):
            raise ValueError(f"dispatch is {self.dispatch!r}; give {', '.join(get_args(DispatchKind))}")
        if self.schedule not in get_args(ScheduleName):
            raise ValueError(f"schedule is {self.schedule!r}; give one of {', '.join(get_args(ScheduleName))}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; give cpu or cuda")
        if self.mesh is not None:
            MeshSpec.parse(self.mesh)

    def mesh_spec(self, world_size: int, local_world_size: int | None = None) -> MeshSpec:
        """The mesh of a run of ``world_size`` ranks, ``local_world_size`` on each machine.

        Raises:
            ValueError: a mesh of another number of ranks, or that does not fit its nodes.
        """
        spec = MeshSpec(dp=world_size) if self.mesh is None else MeshSpec.parse(self.mesh)
        if spec.world_size != world_size:
            raise ValueError(
                f"mesh {spec} is of {spec.world_size} ranks and there are {world_size}; give a mesh whose pp x dp is "
                f"{world_size}, or start {spec.world_size} (torchrun --nproc-per-node {spec.world_size} -m abyssal ...)"
            )
        on_node = self.ranks_per_node or local_world_size
        return spec if on_node is None else spec.on_nodes(on_node)


@dataclass(frozen=True)
class TrainConfig:
    """One training run of a model on a stream of rows.

    Raises:
        ValueError: a field out of its range, by name.
    """

    steps: int | None = None
    """Optimizer steps; 1000 unless tokens are given."""
    tokens: int | None = None
    """Tokens to train on, in place of steps."""
    seq_len: int = 256
    """Tokens of a sequence."""
    batch_size: int = 8
    """Sequences of a step (the global batch)."""
    batch_schedule: str = "constant"
    """Factor on batch_size over the run: constant, v3 (from a fifth, over the first thirtieth), or phases."""
    micro_batch_size: int | None = None
    """Sequences of one forward and backward pass; the step's gradients are accumulated.  None takes the whole batch."""
    seed: int = 0
    """Of initial weights and of the order of the data."""
    compute: Compute | None = None
    """Dtype of activations and of the matrix products; parameters and optimizer are FP32 either way (FP64 with
    float64, for checks). None takes bfloat16 from a hidden size of 512 on, and float32 below, where casting costs more
    than products gain."""
    precision: Literal["compute", "fp8"] = "compute"
    """Operands of the Linears' products: in the dtype of compute, or quantised as DeepSeek-V3's recipe has it [V3
    section 3.3]. On a CPU fp8 is emulated: the same bytes as anywhere, and slower than bfloat16."""
    fp8: Fp8Options = field(default_factory=Fp8Options)
    """What fp8 does otherwise than the paper."""
    model_format: ModelFormat = "fp32"
    """What the trained model is saved in; fp8 of a run in fp8 holds the very codes that it multiplied by. Checkpoints
    hold FP32 always."""
    mtp_weight: float = 0.3
    """λ of the multi-token-prediction loss."""
    mtp_schedule: str = "constant"
    """Factor on λ over the run: constant, v3 (a third after two thirds of the run), or phases."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the parameters in host memory, of this decay a step, such as 0.999."""
    recompute: tuple[Recomputed, ...] = ()
    """Activations to compute again in the backward instead of keeping them [V3 section 3.2.3]."""
    document_mask: bool = False
    """Keep attention inside a document. V3 lets packed documents see one another."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    validation_batches: int = 8
    """Batches of held-out text at each validation but the last, which takes all of it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}; give one of them")
        _check_range(self, 1, math.inf, "seq_len", "batch_size", "validate_every", "validation_batches")
        _check_range(self, 1, math.inf, *(name for name in ("steps", "tokens") if getattr(self, name) is not None))
        _check_range(self, 0, math.inf, "mtp_weight")
        _check_range(self, 0, (1 << 63) - 1, "seed")
        if self.precision not in ("compute", "fp8"):
            raise ValueError(f"precision is {self.precision!r}; give compute or fp8")
        if self.model_format not in get_args(ModelFormat):
            raise ValueError(f"model_format is {self.model_format!r}; give {' or '.join(get_args(ModelFormat))}")
        if self.precision == "fp8" and self.compute == "float64":
            raise ValueError("precision is fp8 and compute float64: quantised products are FP32; leave compute out")
        if self.precision != "fp8" and self.fp8 != Fp8Options():
            raise ValueError(
                f"fp8 has options, but precision is {self.precision}; give precision fp8 (--precision fp8)"
            )
        if self.model_format == "fp8" and self.fp8.granularity == "tensor":
            raise ValueError(
                "model_format is fp8 and fp8.granularity tensor, but FP8 checkpoints have scales by blocks: give "
                "model_format bf16 or fp32"
            )
        if self.ema_decay is not None:
            _check_range(self, 0, 1, "ema_decay")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, which does not divide batch_size {self.batch_size}; "
                "give a divisor"
            )
        for name in self.recompute:
            if name not in get_args(Recomputed):
                raise ValueError(f"recompute names {name!r}; choose among {', '.join(get_args(Recomputed))}")
        self.mtp_factor()
        parse_schedule("batch_schedule", self.batch_schedule, BATCH_SIZES)

    def mtp_factor(self) -> Schedule:
        return parse_schedule("mtp_schedule", self.mtp_schedule, MTP_WEIGHTS)

    def resolved(self, spec: ModelSpec) -> TrainConfig:
        """Everything that was left open, decided: ``compute`` by the model's size, and ``steps``."""
        steps = DEFAULT_STEPS if self.steps is None and self.tokens is None else self.steps
        compute = "bfloat16" if self.precision == "fp8" else default_compute(spec.hidden_size)
        return replace(self, compute=self.compute or compute, steps=steps)

    def plan(self, num_ranks: int = 1) -> RunPlan:
        """Every step of the run, of as many rows for each of ``num_ranks`` data-parallel ranks.

        Raises:
            ValueError: a batch that the ranks' micro-batches do not divide.
        """
        steps = DEFAULT_STEPS if self.steps is None and self.tokens is None else self.steps
        micro = (self.micro_batch_size or 1) * num_ranks
        if self.batch_size % micro:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {num_ranks} data-parallel ranks of micro-batches of "
                f"{self.micro_batch_size or 1} do not divide; give a multiple of {micro}"
            )
        schedule = parse_schedule("batch_schedule", self.batch_schedule, BATCH_SIZES)
        return plan_run(steps, self.tokens, self.seq_len, self.batch_size, micro, schedule)

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuse sequences that the model has no positions for, and products that it does not have.

        Raises:
            ValueError: ``seq_len`` past ``max_positions``, or a name in ``fp8.high_precision``.
        """
        there = products_of(spec)
        for name in self.fp8.high_precision:
            if name not in there:
                raise ValueError(
                    f"fp8.high_precision names {name}, which this model doesn't have; choose among "
                    f"{', '.join(sorted(there - NEVER_FP8))}"
                )
        if self.seq_len > spec.max_positions:
            raise ValueError(
                f"seq_len is {self.seq_len}, past the model's max_positions {spec.max_positions}; "
                "give a shorter seq_len, or extend the model with YaRN (--extend)"
            )
