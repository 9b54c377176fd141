"""One optimizer step: forward and backward of each micro-batch, clip, AdamW, and the biases' own update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.model.transformer import Transformer
from abyssal.train.balance import Loads, SequenceBalanceLoss, add_loads, mean_max_violation, update_biases
from abyssal.train.config import TrainConfig
from abyssal.train.loss import training_loss
from abyssal.train.optimizer import build_optimizer, clip_gradients, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses in nats a token, before the update."""

    loss: float
    """Of the next token, the main model's."""
    mtp_loss: float
    """Mean over MTP depths; 0 without."""
    balance_loss: float
    """Sum over layers, α included."""
    grad_norm: float
    """Before clipping."""
    lr: float
    loads: Loads
    """Of the whole batch."""

    @property
    def max_violation(self) -> float:
        """MaxVio_batch, averaged over layers."""
        return mean_max_violation(self.loads)


class Trainer:
    """A model and its optimizer.

    Attributes:
        optimizer: AdamW over the model's parameters.
    """

    def __init__(self, model: Transformer, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.optimizer = build_optimizer(model, config.optimizer)
        self._parameters = list(model.parameters())
        moe, alpha = model.spec.moe, config.balance.balance_alpha
        self._balance = SequenceBalanceLoss(moe, alpha, 1 / config.micro_batches) if moe is not None and alpha else None

    def step(self, tokens_BX: Tensor, step: int) -> StepResult:
        """Train on one batch.

        Args:
            tokens_BX: int64, the global batch; ``seq_len + 1 + mtp_depth`` tokens a row.
            step: from 0; decides learning rate and γ.

        Raises:
            FloatingPointError: the loss is no longer finite.  The parameters are as before the step.
        """
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64)
        loads: Loads = {}
        for micro_BX in tokens_BX.chunk(config.micro_batches):
            losses = training_loss(self.model, micro_BX, config.mtp_weight, self._balance)
            (losses.total / config.micro_batches).backward()
            add_loads(loads, losses.step.routings)
            mtp = sum(float(loss) for loss in losses.mtp) / max(1, len(losses.mtp))
            balance = sum(float(loss) for loss in losses.step.balance_losses.values())
            sums += torch.tensor([float(losses.main), mtp, balance * config.micro_batches], dtype=torch.float64)
        loss, mtp_loss, balance_loss = (sums / config.micro_batches).tolist()
        norm = float(clip_gradients(self._parameters, config.optimizer.clip))
        if not (torch.isfinite(sums).all() and norm < float("inf")):
            raise FloatingPointError(
                f"step {step}: the loss is {loss} with a gradient norm of {norm}; lower lr or lengthen warmup_steps"
            )
        lr = config.optimizer.learning_rate(step, config.steps)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        update_biases(self.model, loads, config.balance.speed(step, config.steps))
        return StepResult(loss, mtp_loss, balance_loss, norm, lr, loads)
