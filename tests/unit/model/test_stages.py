"""The stages, whole and cut apart: one result, one gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abyssal.model.block import Block
from abyssal.model.context import AttentionGroup, PackedBatch, PagedStep
from abyssal.model.stages import COMMUNICATING, STAGES, StageIO, StageRun
from abyssal.model.step import Step
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import WeightQueue
from abyssal.train.balance import BalanceLosses
from abyssal.train.config import BalanceConfig
from tests.support.parity import draw_spec, moe_of, random_model, random_tokens


def cut_run(block: Block, x_TD: Tensor, gradient_TD: Tensor, step: Step, weights_last: bool) -> tuple[Tensor, Tensor]:
    """Forward and backward through cut stages; the output and the input's gradient."""
    runs, io = [], StageIO(x_TD)
    for name in STAGES:
        runs.append(StageRun(name, block, step))
        io = runs[-1].forward(io)
    gradients = {"x_TD": gradient_TD}
    for run in reversed(runs):
        gradients = run.backward_input(gradients)
        if not weights_last:
            run.backward_weight()
    if weights_last:
        for run in runs:
            run.backward_weight()
    return io.x_TD.detach(), gradients["x_TD"]


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    result = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in result.values())
    module.zero_grad()
    return result  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights_last", [False, True])
def test_cut_stages_equal_the_whole_layer_bit_for_bit(family: str, dtype: torch.dtype, weights_last: bool) -> None:
    model = random_model(draw_spec(family, 1), dtype=dtype)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    shape = (24, model.spec.hidden_size)
    x_TD, gradient_TD = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for block in model.layers:
        assert isinstance(block, Block)
        leaf = x_TD.clone().requires_grad_()
        whole = block(leaf, model.step(PackedBatch([12, 12])))
        whole.backward(gradient_TD)
        expected = gradients_of(block)

        step = model.step(PackedBatch([12, 12]))
        output, input_gradient = cut_run(block, x_TD, gradient_TD, step, weights_last)
        assert torch.equal(output, whole.detach())
        assert leaf.grad is not None and torch.equal(input_gradient, leaf.grad)
        actual = gradients_of(block)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_cut_stages_carry_the_balance_loss() -> None:
    """The auxiliary loss joins the backward inside its layer, so a cut layer has it too, bit for bit."""
    spec = draw_spec("deepseek_v3", 1)
    assert spec.moe is not None
    model = random_model(spec, dtype=torch.float64)
    block = model.layers[-1]
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(3)
    shape = (24, spec.hidden_size)
    x_TD, gradient_TD = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    balance = BalanceLosses(spec.moe, BalanceConfig(sequence_alpha=0.1))
    block(x_TD, model.step(PackedBatch([12, 12]))).backward(gradient_TD)
    without = gradients_of(block)["ffn.router.weight"]
    block(x_TD, model.step(PackedBatch([12, 12]), balance=balance)).backward(gradient_TD)
    expected = gradients_of(block)["ffn.router.weight"]
    cut_run(block, x_TD, gradient_TD, model.step(PackedBatch([12, 12]), balance=balance), weights_last=True)
    gradient = moe_of(model, -1).router.weight.grad
    assert gradient is not None and torch.equal(gradient, expected) and not torch.allclose(expected, without)


class NoTokens:
    """The context of a rank that has no tokens in a step."""

    positions_T = torch.zeros(0, dtype=torch.long)
    paged: PagedStep | None = None

    def __init__(self, absorbed: bool) -> None:
        self.absorbed = absorbed

    def write(self, layer: int, entries_TX: Tensor) -> Tensor:
        return entries_TX

    def groups(self, layer: int, entries_TX: Tensor) -> Iterator[AttentionGroup]:
        return iter(())


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_rank_without_tokens_runs_every_stage(family: str, absorbed: bool, grad: bool) -> None:
    model = random_model(draw_spec(family, 1))  # type: ignore[arg-type]
    with torch.set_grad_enabled(grad):
        hidden = model.hidden(torch.zeros(0, dtype=torch.long), model.step(NoTokens(absorbed)))
        assert model.logits(hidden).shape == (0, model.spec.vocab_size)
    if grad:
        hidden.sum().backward()
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_every_block_has_its_own_number() -> None:
    """Caches, routings and placements are kept by it, those of MTP modules too."""
    spec = replace(draw_spec("deepseek_v3", 3), mtp_depth=2)
    model, tokens = random_model(spec), torch.arange(2, 12)
    assert [block.layer for block in model.blocks()] == list(range(spec.num_layers + 2))
    step = model.step(PackedBatch([10]))
    hidden = model.hidden(tokens, step)
    for depth in range(2):
        hidden = model.mtp_hidden(depth, tokens, hidden, step)
    assert list(step.routings) == list(model.placements()) == list(range(spec.num_dense_layers, spec.num_layers + 2))


def test_initial_weights() -> None:
    """Normal with the spec's deviation; norms one, biases zero; the same for the same seed."""
    spec = replace(draw_spec("deepseek_v3", 1), init_std=0.03, hidden_size=96)
    first, again = Transformer(spec), Transformer(spec)
    for model in (first, again):
        model.init_weights(torch.Generator().manual_seed(7))
    for (name, tensor), other in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        elif name.endswith("bias_E"):
            assert (tensor == 0).all()
        else:
            assert abs(tensor.std().item() / 0.03 - 1) < 4 * (2 * tensor.numel()) ** -0.5, name


def test_only_dispatch_and_combine_communicate() -> None:
    model = random_model(draw_spec("deepseek_v3", 1))
    step = model.step(PackedBatch([4]))
    block = model.layers[-1]
    runs = {name: StageRun(name, block, step) for name in STAGES}  # type: ignore[arg-type]
    assert {name for name, run in runs.items() if run.communicates} == set(COMMUNICATING) == {"dispatch", "combine"}


def whole_model_loss(model: Transformer, tokens: Tensor, queue: WeightQueue | None, absorbed: bool) -> Tensor:
    step = model.step(PackedBatch([tokens.shape[1]] * len(tokens), absorbed=absorbed), queue=queue)
    hidden = model.hidden(tokens.flatten(), step)
    shifted = tokens.roll(-1, 1).flatten()
    for depth in range(model.spec.mtp_depth):
        hidden = model.mtp_hidden(depth, shifted, hidden, step)
    return model.logits(hidden).square().mean()


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_weight_queue_gives_the_gradients_of_autograd(family: str, absorbed: bool) -> None:
    spec = draw_spec(family, 3)  # type: ignore[arg-type]
    spec = replace(spec, mtp_depth=1) if family == "deepseek_v3" else spec
    model = random_model(spec, dtype=torch.float64)
    tokens = random_tokens(spec, 2, 10)
    whole_model_loss(model, tokens, None, absorbed).backward()
    expected = gradients_of(model)

    queue = WeightQueue()
    whole_model_loss(model, tokens, queue, absorbed).backward()
    assert len(queue) > 10
    assert all(block.attention.out.weight.grad is None for block in model.blocks())
    queue.run()
    assert len(queue) == 0
    actual = gradients_of(model)
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-12, atol=1e-14), name
