"""The training loop: batches in, steps, validation at intervals, observers told.

The loop owns no files and prints nothing; what is written and shown is the observers' business.  With the same config,
tokens and number of threads, a run on CPU gives the same losses bit for bit: weights and data order are functions of
the seed, and every operator used sums in a fixed order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from abyssal.data.batches import TokenStream, held_out_batches
from abyssal.model.transformer import Transformer
from abyssal.precision.recipe import Recipe
from abyssal.spec.model import ModelSpec
from abyssal.train.config import TrainConfig, default_compute
from abyssal.train.evaluate import Evaluation, evaluate
from abyssal.train.metrics import Observer, StepRecord, ValidationRecord
from abyssal.train.step import Trainer
from abyssal.train.text import TokenisedCorpus


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    model: Transformer
    evaluation: Evaluation
    """Of the whole held-out text, after the last step."""
    tokens: int
    """Trained on."""
    seconds: float
    """Spent in training steps."""


def build_model(spec: ModelSpec, config: TrainConfig) -> Transformer:
    """The model at step 0: FP32 parameters drawn from the seed, activations in ``config.compute``."""
    compute = config.compute or default_compute(spec.hidden_size)
    model = Transformer(spec, Recipe(activations=compute), dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def with_recipe(model: Transformer, recipe: Recipe) -> Transformer:
    """Another model over the same parameters and buffers, computing under ``recipe``."""
    other = Transformer(model.spec, recipe, placements=model.placements(), device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def open_stream(spec: ModelSpec, config: TrainConfig, text: TokenisedCorpus) -> TokenStream:
    """Training batches of ``text`` for ``spec``, once everything has been found to fit.

    Raises:
        ValueError: a tokenizer or a sequence length that does not fit the model; too little text on either side.
    """
    text.tokenizer.check_fits(spec)
    config.check_fits(spec)
    held_out_batches(text.held_out_tokens, config.seq_len, config.batch_size, extra=spec.mtp_depth)
    return TokenStream(text.train_tokens, config.seq_len, config.batch_size, config.seed, spec.mtp_depth)


def train(
    spec: ModelSpec, config: TrainConfig, text: TokenisedCorpus, observers: Sequence[Observer] = ()
) -> TrainResult:
    """Train a new model.

    Args:
        spec: its vocabulary is the tokenizer's (:meth:`~abyssal.train.text.TokenisedCorpus.fitted`), or larger.
        text: where batches come from.

    Raises:
        ValueError: what :func:`open_stream` raises.
        FloatingPointError: the loss is no longer finite.
    """
    stream = open_stream(spec, config, text)
    model = build_model(spec, config)
    trainer = Trainer(model, config)

    def validate(num_batches: int | None) -> Evaluation:
        tokens, bytes_ = text.held_out_tokens, text.token_bytes
        return evaluate(model, tokens, bytes_, config.seq_len, config.batch_size, num_batches)

    def tell_validation(step: int, evaluation: Evaluation) -> None:
        for observer in observers:
            observer.on_validation(ValidationRecord(step, evaluation, seconds))

    seconds = 0.0
    tell_validation(0, validate(config.validation_batches))
    for step in range(config.steps):
        begin = time.perf_counter()
        result = trainer.step(torch.from_numpy(stream.batch(step)), step)
        elapsed = time.perf_counter() - begin
        seconds += elapsed
        tokens = (step + 1) * stream.tokens_per_batch
        record = StepRecord(step + 1, result, tokens, seconds, stream.tokens_per_batch / elapsed)
        for observer in observers:
            observer.on_step(record)
        if (step + 1) % config.validate_every == 0 and step + 1 < config.steps:
            tell_validation(step + 1, validate(config.validation_batches))
    final = validate(None)
    tell_validation(config.steps, final)
    return TrainResult(model, final, config.steps * stream.tokens_per_batch, seconds)
