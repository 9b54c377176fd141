"""One step and whole short runs: determinism, accumulation, weight decay, refusal of nonsense."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from abyssal.data.corpus import split_documents, tokenize
from abyssal.data.sources import Document
from abyssal.precision.recipe import Recipe
from abyssal.text.tokenizer import train_bpe
from abyssal.train.config import BalanceConfig, OptimizerConfig, TrainConfig
from abyssal.train.history import History
from abyssal.train.loop import build_model, train, with_recipe
from abyssal.train.optimizer import build_optimizer
from abyssal.train.step import Trainer
from abyssal.train.text import TokenisedCorpus
from tests.support.checkpoints import SMALL

SPEC = dataclasses.replace(SMALL, init_std=0.1)
CONFIG = TrainConfig(steps=4, seq_len=8, batch_size=4, optimizer=OptimizerConfig(lr=1e-2), validate_every=2)


def small_text() -> TokenisedCorpus:
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "\n", "def", "return"]
    documents = [Document(" ".join(random.choice(words, 60)), str(i)) for i in range(20)]
    corpus = split_documents(documents, 0.2)
    tokenizer = train_bpe((document.text for document in corpus.train_documents), 300)
    return TokenisedCorpus(
        corpus, tokenizer, tokenize(corpus.train_documents, tokenizer), tokenize(corpus.held_out_documents, tokenizer)
    )


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SPEC.vocab_size, (4, 8 + 2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_run_repeated_gives_the_same_losses_bit_for_bit(compute) -> None:
    text = small_text()
    config = dataclasses.replace(CONFIG, compute=compute)

    def run() -> tuple[list[float], list[tuple[int, float]]]:
        history = History()
        train(text.fitted(SPEC), config, text, [history])
        return history.losses, history.validations

    assert run() == run()


def test_another_seed_gives_another_run() -> None:
    text = small_text()
    losses = []
    for seed in (0, 1):
        history = History()
        train(text.fitted(SPEC), dataclasses.replace(CONFIG, seed=seed), text, [history])
        losses.append(history.losses)
    assert losses[0] != losses[1]


def test_accumulated_micro_batches_are_one_batch() -> None:
    models = []
    for micro_batch_size in (None, 2):
        config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
        model = with_recipe(build_model(SPEC, config).double(), Recipe())  # FP64 throughout
        result = Trainer(model, config).step(batch(), 0)
        models.append((model, result))
    (whole, one), (parts, two) = models
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
    assert one.mtp_loss == pytest.approx(two.mtp_loss, rel=1e-12)
    assert one.balance_loss == pytest.approx(two.balance_loss, rel=1e-10)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-10)
    assert {layer: load.tolist() for layer, load in one.loads.items()} == {
        layer: load.tolist() for layer, load in two.loads.items()
    }
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)


def test_gradients_are_clipped_to_one_norm() -> None:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(lr=1e-2, clip=1e-3))
    model = build_model(SPEC, config)
    result = Trainer(model, config).step(batch(), 0)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert result.grad_norm > 1e-2
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_matrices_decay_and_norms_do_not() -> None:
    model = build_model(SPEC, CONFIG)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, CONFIG.optimizer).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decay.pop(id(parameter)) == (0.0 if name.endswith("norm.weight") else 0.1), name
    assert not decay


def test_biases_move_once_a_step_by_gamma() -> None:
    config = dataclasses.replace(CONFIG, micro_batch_size=1, balance=BalanceConfig(bias_speed=0.25))
    model = build_model(SPEC, config)
    Trainer(model, config).step(batch(), 0)
    biases = torch.cat([b for n, b in model.named_buffers() if n.endswith("bias_E")])
    assert set(biases.abs().tolist()) <= {0.0, 0.25}
    assert float(biases.abs().max()) == 0.25


def test_a_loss_that_is_not_finite_stops_before_the_parameters_change() -> None:
    model = build_model(SPEC, CONFIG)
    trainer = Trainer(model, CONFIG)
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    before = model.embed.weight.clone()
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        trainer.step(batch(), 3)
    assert torch.equal(model.embed.weight, before)


def test_with_recipe_shares_parameters() -> None:
    model = build_model(SPEC, dataclasses.replace(CONFIG, compute="bfloat16"))
    other = with_recipe(model, Recipe())
    tokens = batch()[:, :8]
    assert model(tokens).dtype == torch.bfloat16 and other(tokens).dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].data_ptr() == tensor.data_ptr(), name


def test_a_sequence_past_the_models_length_is_refused() -> None:
    text = small_text()
    spec = dataclasses.replace(text.fitted(SPEC), max_positions=7)
    with pytest.raises(ValueError, match="seq_len is 8, past the model's max_positions 7"):
        train(spec, CONFIG, text)
    with pytest.raises(ValueError, match="vocab_size is 40"):
        train(SPEC, CONFIG, text)
