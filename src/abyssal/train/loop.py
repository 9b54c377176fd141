"""The training loop: batches in, steps, validation and checkpoints at intervals, observers told.

The loop prints nothing; what is written and shown is the observers' business.  With the same config, data and number
of threads, a run on CPU gives the same numbers bit for bit, interrupted or not: weights and rows are functions of the
seed, every operator used sums in a fixed order, and a checkpoint holds everything else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from abyssal.data.batch import Batch
from abyssal.model.share import ExpertShare
from abyssal.model.transformer import Transformer
from abyssal.precision.recipe import Recipe, fp8_recipe
from abyssal.spec.arithmetic import training_flops_per_token
from abyssal.spec.model import ModelSpec
from abyssal.train.checkpoints import Checkpoints, saved_checkpoints
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData
from abyssal.train.evaluate import Evaluation, evaluate
from abyssal.train.fault import TrainingFault, describe_bad_validation
from abyssal.train.loss import hidden_states
from abyssal.train.metrics import Observer, StepRecord, ValidationRecord
from abyssal.train.peak import share_of_peak
from abyssal.train.step import StepResult, Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    trainer: Trainer
    evaluation: Evaluation
    """Of the whole held-out text, after the last step."""
    tokens: int
    """Trained on."""
    seconds: float
    """Spent in training steps."""

    @property
    def model(self) -> Transformer:
        return self.trainer.model


def training_recipe(spec: ModelSpec, config: TrainConfig) -> Recipe:
    """What is computed in which format, and what is computed twice."""
    config = config.resolved(spec)
    if config.precision == "fp8":
        assert config.compute == "bfloat16" or config.compute == "float32"
        return fp8_recipe(config.fp8, config.compute, config.recompute)
    activations = "parameter" if config.compute in (None, "float64") else config.compute
    return Recipe(activations=activations, recompute=frozenset(config.recompute))


def build_model(spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None) -> Transformer:
    """The model at step 0: parameters in FP32 (FP64 for ``float64``) drawn from the seed, alike whatever the share."""
    dtype = torch.float64 if config.compute == "float64" else torch.float32
    share = share or ExpertShare({}, 0)
    where = {"placements": share.placements, "expert_rank": share.rank, "part": share.part}
    model = Transformer(spec, training_recipe(spec, config), dtype=dtype, **where)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def with_recipe(model: Transformer, recipe: Recipe) -> Transformer:
    """Another model over the same parameters and buffers, computing under ``recipe``."""
    other = Transformer(model.spec, recipe, placements=model.placements(), device="meta", expert_rank=model.expert_rank)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


class Loop:
    """One run from where its trainer stands to the end of its plan.

    Args:
        checkpoints: where the state is saved; None saves none.
        peak: FLOP/s of the machine's matrix products, for the share of it that a step reaches.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: TrainingData,
        observers: Sequence[Observer] = (),
        checkpoints: Checkpoints | None = None,
        peak: float | None = None,
    ) -> None:
        self._trainer = trainer
        self._data = data
        self._observers = observers
        self._checkpoints = checkpoints
        self._peak = peak
        spec, config = trainer.model.spec, trainer.config
        self._flops = training_flops_per_token(spec, config.seq_len, include_mtp=spec.mtp_depth > 0)

    def run(self) -> TrainResult:
        """Train to the end.

        Raises:
            TrainingFault: a loss, on held-out text too, or a gradient is no longer finite; names the last good
                checkpoint.
            ValueError: a checkpoint that could not be written.
        """
        trainer, config = self._trainer, self._trainer.config
        num_steps = trainer.plan.num_steps
        if trainer.steps_done == 0:
            self._validate(config.validation_batches)
        while trainer.steps_done < num_steps:
            self._step()
            done = trainer.steps_done
            if done % config.validate_every == 0 and done < num_steps:
                self._validate(config.validation_batches)
            self._save_when_due()
        evaluation = self._validate(None)
        return TrainResult(trainer, evaluation, trainer.plan.num_tokens, trainer.seconds)

    def _step(self) -> None:
        trainer = self._trainer
        planned = trainer.plan.step(trainer.steps_done)
        begin = time.perf_counter()
        batch = self._data.stream.rows(*trainer.rows(planned.step))
        try:
            result = trainer.step(batch)
        except TrainingFault as fault:
            raise TrainingFault(fault.step, f"{fault}; {self._last_good()}") from fault
        elapsed = time.perf_counter() - begin
        trainer.seconds += elapsed
        speed = planned.num_rows * trainer.config.seq_len / elapsed
        own_speed = speed / trainer.ranks.num_ranks
        share = None if self._peak is None else share_of_peak(own_speed, self._flops, self._peak)
        tokens = trainer.plan.tokens_before(trainer.steps_done)
        record = StepRecord(trainer.steps_done, result, planned.num_rows, tokens, trainer.seconds, speed, share)
        for observer in self._observers:
            observer.on_step(record)
        self._tell_events(result)

    def _tell_events(self, result: StepResult) -> None:
        for starvation in result.starved:
            self._tell({"event": "alarm", "step": self._trainer.steps_done, **asdict(starvation)})
        if result.ranks is not None and result.ranks.moved:
            self._tell({"event": "placement", "step": self._trainer.steps_done, "moved": result.ranks.moved})

    def _tell(self, event: dict[str, object]) -> None:
        for observer in self._observers:
            observer.on_event(event)

    def _last_good(self) -> str:
        """The newest checkpoint from which a step went well: one of this very step holds what has just failed."""
        if self._checkpoints is None:
            return "no checkpoint was saved before"
        self._checkpoints.wait()
        saved = saved_checkpoints(self._checkpoints.folder)
        good = [checkpoint for checkpoint in saved if checkpoint.step < self._trainer.steps_done]
        failed = [checkpoint for checkpoint in saved if checkpoint.step == self._trainer.steps_done]
        remedy = f"; {failed[0].path.name} holds what failed: remove it to --resume from there" if failed else ""
        return f"the last good checkpoint is {good[-1].path}{remedy}" if good else "no good checkpoint was saved before"

    def _validate(self, num_batches: int | None) -> Evaluation:
        trainer = self._trainer
        where = trainer.dispatcher, trainer.ranks
        forward = hidden_states if trainer.pipeline is None else trainer.pipeline.hidden
        evaluation = evaluate(trainer.model, self._held_out(num_batches), self._data.token_bytes, *where, forward)
        if not all(map(math.isfinite, (evaluation.loss, *evaluation.mtp_losses))):
            parts = list(self._held_out(1))
            whole = trainer.pipeline is None
            fault = describe_bad_validation(trainer.model, parts, trainer.steps_done, evaluation.loss, *where, whole)
            raise TrainingFault(fault.step, f"{fault}; {self._last_good()}")
        for observer in self._observers:
            observer.on_validation(ValidationRecord(trainer.steps_done, evaluation, trainer.seconds))
        return evaluation

    def _held_out(self, num_batches: int | None) -> Iterator[Batch]:
        """Held-out rows, no more at once than training takes."""
        for batch in self._data.held_out(num_batches):
            micro = self._trainer.config.micro_batch_size
            yield from batch.parts(None if micro is None else micro * self._trainer.ranks.num_ranks)

    def _save_when_due(self) -> None:
        trainer, every = self._trainer, self._trainer.config.checkpoint.save_every
        done = trainer.steps_done
        if self._checkpoints is None or not every or (done % every and done < trainer.plan.num_steps):
            return
        self._tell({"event": "checkpoint", "step": done})  # first: a resumed run's metrics go on after this line
        self._checkpoints.save(done, trainer.tensors(), trainer.fields())
