"""Gradients of every Linear, taken from a training run as it goes.

The run is ``abyssal train``'s own, in FP32, on the standard library's source; its inner dimensions are such that every
product in FP8 sums over at least two blocks.  What is captured are the gradients dy that Dgrad multiplies, with their
weights as they are at that step.  Layers of a mixture keep their rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.text import prepared
from torch import Tensor, nn

from abyssal.model.experts import Experts
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.train.config import CheckpointConfig, OptimizerConfig, TrainConfig, width_init_std
from abyssal.train.data import fitted, pretraining_data
from abyssal.train.folder import RunFolder
from abyssal.train.loop import build_model
from abyssal.train.metrics import StepRecord, ValidationRecord
from abyssal.train.run import Run, run_training

VOCAB_SIZE = 2048
WIDTH = 256


@dataclass(frozen=True)
class Captured:
    """What Dgrad of one product reads.

    Attributes:
        dy_TO: gradients of the outputs, rows sorted by group.
        weights: one matrix (O, I) a group.
        parts: matrices that are stacked along O: two for gate and up.
        counts: rows of each group.
    """

    product: str
    layer: int
    step: int
    dy_TO: Tensor
    weights: Sequence[Tensor]
    parts: int
    counts: Sequence[int]


@dataclass
class Capture:
    """Hooks on a model's products, which take at chosen steps; an observer of the run, which tells it the step."""

    steps: Sequence[int]
    """From 1."""
    taken: dict[tuple[str, int, int], Captured] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def watch(self, model: Transformer) -> Transformer:
        """Hook every product that the paper has in FP8."""
        for name, module in model.named_modules():
            if not name.startswith("layers."):
                continue
            layer, place = int(name.split(".")[1]), ".".join(name.split(".")[2:])
            if isinstance(module, Linear):
                module.register_forward_hook(self._linear_hook(place, layer))
            elif isinstance(module, Experts):
                self._wrap(module, "gate_up", place, layer, module.w_gate_up_EFD)
                self._wrap(module, "down", place, layer, module.w_down_EDF)
        return model

    def _linear_hook(self, place: str, layer: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, _: object, y_TO: Tensor) -> None:
            assert isinstance(module, Linear)
            self._expect(y_TO, place, layer, [module.weight], [len(y_TO)])

        return hook

    def _wrap(self, module: Experts, method: str, place: str, layer: int, weights: Tensor) -> None:
        inner = getattr(module, method)

        def product(rows: Tensor, counts: Sequence[int], *more: object) -> Tensor:
            y = inner(rows, counts, *more)
            self._expect(y, f"{place}.{method}", layer, weights, counts)
            return y

        setattr(module, method, product)

    def _expect(
        self, y_TO: Tensor, place: str, layer: int, weights: Sequence[Tensor] | Tensor, counts: Sequence[int]
    ) -> None:
        """Take the gradient of ``y_TO`` when it comes, if this step is wanted."""
        step = len(self.losses) + 1
        key = (place, layer, step)
        if step not in self.steps or not y_TO.requires_grad:
            return

        def take(dy_TO: Tensor) -> None:
            kept = [weight.detach().clone() for weight in weights]
            parts = 2 if place.endswith("gate_up") else 1
            self.taken[key] = Captured(place, layer, step, dy_TO.detach().clone(), kept, parts, list(counts))

        y_TO.register_hook(take)

    def on_step(self, record: StepRecord) -> None:
        self.losses.append(record.result.loss)

    def on_validation(self, record: ValidationRecord) -> None: ...

    def on_event(self, event: Mapping[str, Any]) -> None: ...


def model() -> ModelSpec:
    """Three layers of width 256, the first dense, the others with eight experts of which a token takes two."""
    return ModelSpec(
        family="deepseek_v3",
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_layers=3,
        dense_ffn_size=3 * WIDTH,
        attention=LatentAttentionSpec(
            num_heads=8, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoESpec(num_experts=8, num_shared_experts=1, top_k=2, expert_ffn_size=256, route_scale=2.5),
        num_dense_layers=1,
        mtp_depth=0,
        init_std=width_init_std(WIDTH),
    )


def captured(out: Path, steps: Sequence[int], batch_size: int, seq_len: int, smoke: bool) -> Capture:
    """Train to the last of ``steps``, taking at each.

    Args:
        out: an empty folder for the text and the run.
    """
    data = prepared(out / "data", None, VOCAB_SIZE, smoke)
    spec = fitted(model(), data.tokenizer())
    config = TrainConfig(
        steps=max(steps),
        seq_len=seq_len,
        batch_size=batch_size,
        compute="float32",
        validation_batches=1,
        validate_every=max(steps),
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(save_every=0),
    ).resolved(spec)
    capture = Capture(steps)
    run = Run(spec, config, pretraining_data([data], spec, config), lambda *made: capture.watch(build_model(*made)))
    run_training(RunFolder(out / "run"), run, [capture], save=lambda _: None, measure_peak=False)
    return capture
