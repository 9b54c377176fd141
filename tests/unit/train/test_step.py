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
from abyssal.train.balance import SequenceBalanceLoss, add_loads, update_biases
from abyssal.train.config import BalanceConfig, OptimizerConfig, TrainConfig
from abyssal.train.history import History
from abyssal.train.loop import build_model, train, with_recipe
from abyssal.train.loss import training_loss
from abyssal.train.optimizer import build_optimizer
from abyssal.train.step import Trainer
from abyssal.train.text import TokenisedCorpus
from tests.support.checkpoints import SMALL

SPEC = dataclasses.replace(SMALL, init_std=0.1)
assert SPEC.moe is not None
MOE = SPEC.moe
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


def test_steps_are_adamw_on_the_loss_with_its_schedules() -> None:
    """Three steps against a plain loop: the MTP and balance losses, no gradients carried over, rates of each step."""
    optimizer = OptimizerConfig(
        lr=1e-2, warmup_steps=1, lr_floor=0.0, beta1=0.7, beta2=0.8, eps=1e-4, weight_decay=0.3, clip=0.5
    )
    balance = BalanceConfig(bias_speed=0.1, bias_decay="linear", bias_freeze=0.0, balance_alpha=0.5)
    config = dataclasses.replace(CONFIG, steps=10, mtp_weight=0.4, optimizer=optimizer, balance=balance)
    ours, plain = (with_recipe(build_model(SPEC, config).double(), Recipe()) for _ in range(2))
    trainer = Trainer(ours, config)
    matrices, norms = ([p for p in plain.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.7, 0.8), eps=1e-4, foreach=False,
    )  # fmt: skip
    rates = []
    for step in range(3):
        result = trainer.step(batch(step), step)
        adam.zero_grad()
        loss = training_loss(plain, batch(step), 0.4, SequenceBalanceLoss(MOE, 0.5))
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = optimizer.learning_rate(step, 10)
        adam.step()
        loads: dict[int, torch.Tensor] = {}
        add_loads(loads, loss.step.routings)
        update_biases(plain, loads, balance.speed(step, 10))
        rates.append(result.lr)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-10) and norm > 0.5
        assert result.loss == pytest.approx(float(loss.main), rel=1e-10)
        assert result.balance_loss == pytest.approx(sum(map(float, loss.step.balance_losses.values())), rel=1e-10)
    assert rates[1] == 1e-2 > rates[2] > 0.0
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-7, atol=1e-9, msg=name)


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
