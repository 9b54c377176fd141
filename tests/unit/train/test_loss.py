"""The training loss against torch's own cross-entropy, and what each position is asked to predict."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy
from abyssal.precision.recipe import LinearEntry, Recipe
from abyssal.train.balance import SequenceBalanceLoss
from abyssal.train.loss import hidden_and_targets, packed_step, training_loss
from tests.support.checkpoints import SMALL


def small_model(mtp_depth: int = 2, dtype: torch.dtype = torch.float64) -> Transformer:
    spec = dataclasses.replace(SMALL, mtp_depth=mtp_depth, init_std=0.1)
    model = Transformer(spec, dtype=dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batch(model: Transformer, rows: int = 3, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SMALL.vocab_size, (rows, length + 1 + len(model.mtp)), generator=generator)


def test_linear_cross_entropy_is_torchs_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1100, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 31, (1100,), generator=generator)
    ours = linear_cross_entropy(hidden, weight, targets, LinearEntry()) / 1100
    theirs = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_training_loss_is_the_mean_cross_entropy_of_each_depth() -> None:
    model = small_model()
    tokens = batch(model)
    loss = training_loss(model, tokens, mtp_weight=0.3)
    step = packed_step(model, tokens)
    expected = [
        F.cross_entropy(model.logits(hidden), targets) for hidden, targets in hidden_and_targets(model, tokens, step)
    ]
    torch.testing.assert_close(loss.main, expected[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(loss.mtp), torch.stack(expected[1:]).detach(), rtol=1e-12, atol=0)
    total = expected[0] + 0.3 / 2 * (expected[1] + expected[2])
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss.total, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_depth_k_predicts_token_i_plus_k_plus_2_and_sees_no_further() -> None:
    """Changing a row's last token changes the last depth's targets and no hidden state."""
    model = small_model()
    tokens = batch(model)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SMALL.vocab_size
    before = list(hidden_and_targets(model, tokens, packed_step(model, tokens)))
    after = list(hidden_and_targets(model, changed, packed_step(model, changed)))
    for depth, (hidden, targets) in enumerate(before):
        assert torch.equal(targets.view(3, 7), tokens[:, depth + 1 : depth + 8])
        assert torch.equal(hidden, after[depth][0])
    assert torch.equal(before[1][1], after[1][1]) and not torch.equal(before[2][1], after[2][1])


def test_depth_k_reads_token_i_plus_k_plus_1() -> None:
    """Changing one token first shows at its own position in the main model, one earlier with each depth."""
    model = small_model()
    tokens = batch(model)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SMALL.vocab_size
    before = hidden_and_targets(model, tokens, packed_step(model, tokens))
    after = hidden_and_targets(model, changed, packed_step(model, changed))
    for depth, ((hidden, _), (other, _)) in enumerate(zip(before, after, strict=True)):
        differs_BS = ((hidden - other).abs() > 1e-9).any(-1).view(3, 7)  # less is another order of sums
        assert not differs_BS[:, : 4 - depth].any() and differs_BS[:, 4 - depth].all(), depth


def test_balance_loss_joins_the_backward_with_its_own_weight() -> None:
    """Scaling the loss does not scale the balance loss's gradient; twice alpha doubles it."""
    model = small_model(mtp_depth=0)
    assert model.spec.moe is not None
    tokens = batch(model)
    router = model.get_parameter("layers.1.ffn.router.weight")

    def gradient(alpha: float, scale: float) -> torch.Tensor:
        router.grad = None
        balance = SequenceBalanceLoss(model.spec.moe, alpha) if alpha else None  # pyright: ignore[reportArgumentType]
        (training_loss(model, tokens, 0.0, balance).total * scale).backward()
        assert router.grad is not None
        return router.grad

    plain = gradient(0.0, 1.0)
    one, two, alone = gradient(1.0, 1.0) - plain, gradient(2.0, 1.0) - plain, gradient(1.0, 0.0)
    assert float(one.abs().max()) > 1e-6
    torch.testing.assert_close(two, 2 * one, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(alone, one, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_gradients_arrive_in_fp32_under_either_compute(compute) -> None:
    model = Transformer(dataclasses.replace(SMALL, init_std=0.1), Recipe(activations=compute), dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    training_loss(model, batch(model), 0.3).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
