"""One step: its definition, accumulation, weight decay, biases, moments in BF16, the state, refusal of nonsense."""

from __future__ import annotations

import dataclasses
import re
import threading

import numpy as np
import pytest
import torch

from abyssal.data.batch import Batch
from abyssal.precision.recipe import Recipe
from abyssal.train.balance import BalanceLosses, add_loads, update_biases
from abyssal.train.config import BalanceConfig, OptimizerConfig, TrainConfig
from abyssal.train.ema import HostAverage
from abyssal.train.fault import TrainingFault
from abyssal.train.loop import build_model, with_recipe
from abyssal.train.loss import training_loss
from abyssal.train.step import Trainer
from tests.support.checkpoints import SMALL
from tests.support.whole_state import whole_state

SPEC = dataclasses.replace(SMALL, init_std=0.1)
assert SPEC.moe is not None
MOE = SPEC.moe
CONFIG = TrainConfig(steps=4, seq_len=8, batch_size=4, optimizer=OptimizerConfig(lr=1e-2), validate_every=2)


def batch(seed: int = 0, rows: int = 4) -> Batch:
    return Batch(np.random.default_rng(seed).integers(0, SPEC.vocab_size, (rows, 8 + 2)))


def trainer(**fields) -> Trainer:
    config = dataclasses.replace(CONFIG, compute="float64", **fields)
    return Trainer(build_model(SPEC, config), config)


def test_accumulated_micro_batches_are_one_batch() -> None:
    """Also where few targets are learned, and where documents are many, unevenly over the micro-batches."""
    trained_BX = np.random.default_rng(3).random((4, 10)) < 0.4
    trained_BX[2] = False
    documents = ((10,), (1, 2, 7), (5, 5), (9, 1))
    balance = BalanceConfig(sequence_alpha=0.3, expert_alpha=0.2, device_alpha=0.1, communication_alpha=0.1)
    for tokens in (batch(), Batch(batch().tokens_BX, trained_BX), Batch(batch().tokens_BX, trained_BX, documents)):
        whole, parts = trainer(balance=balance), trainer(micro_batch_size=1, balance=balance)
        one, two = whole.step(tokens), parts.step(tokens)
        assert one.loss == pytest.approx(two.loss, rel=1e-12)
        assert one.mtp_losses == pytest.approx(two.mtp_losses, rel=1e-12)
        assert one.balance_loss == pytest.approx(two.balance_loss, rel=1e-10)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-10)
        assert {k: v.tolist() for k, v in one.loads.items()} == {k: v.tolist() for k, v in two.loads.items()}
        for name, tensor in whole.model.state_dict().items():
            torch.testing.assert_close(tensor, parts.model.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)


def test_steps_are_adamw_on_the_loss_with_its_schedules() -> None:
    """Three steps against a plain loop: the MTP and balance losses, no gradients carried over, rates of each step."""
    optimizer = OptimizerConfig(
        lr=1e-2, warmup_steps=1, lr_schedule="linear:1:0", beta1=0.7, beta2=0.8, eps=1e-4, weight_decay=0.3, clip=0.5
    )
    balance = BalanceConfig(bias_speed=0.1, bias_schedule="linear:1:0", sequence_alpha=0.5)
    ours = trainer(steps=10, mtp_weight=0.4, mtp_schedule="linear:1:0", optimizer=optimizer, balance=balance)
    plain = build_model(SPEC, ours.config)
    matrices, norms = ([p for p in plain.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.7, 0.8), eps=1e-4, foreach=False,
    )  # fmt: skip
    for step in range(3):
        result = ours.step(batch(step))
        adam.zero_grad()
        left = 1 - step / 10
        loss = training_loss(plain, batch(step), 0.4 * left, BalanceLosses(MOE, balance))
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * left
        adam.step()
        loads: dict[int, torch.Tensor] = {}
        add_loads(loads, loss.step.routings)
        update_biases(plain, loads, 0.1 * left)
        assert (result.lr, result.mtp_weight, result.bias_speed) == pytest.approx((1e-2 * left, 0.4 * left, 0.1 * left))
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-10) and norm > 0.5
        assert result.loss == pytest.approx(loss.parts[0], rel=1e-10)
        assert result.balance_loss == pytest.approx(sum(map(float, loss.step.balance_losses.values())), rel=1e-10)
    for name, tensor in ours.model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-7, atol=1e-9, msg=name)


def test_moments_in_bf16_take_half_the_memory_and_nearly_the_same_steps() -> None:
    def run(moments: str) -> Trainer:
        optimizer = dataclasses.replace(CONFIG.optimizer, moments=moments)
        config = dataclasses.replace(CONFIG, compute="float32", optimizer=optimizer)
        found = Trainer(build_model(SPEC, config), config)
        for step in range(4):
            found.step(batch(step))
        return found

    full, half = run("float32"), run("bfloat16")
    for name, mean in half.optimizer.means.items():
        assert mean.dtype == half.optimizer.squares[name].dtype == torch.bfloat16
        assert 2 * mean.nbytes == full.optimizer.means[name].nbytes
    for name, parameter in full.model.named_parameters():
        moved = (half.model.get_parameter(name) - parameter).abs().max()
        assert 0 <= float(moved.detach()) < 2e-3, name  # four steps of at most 1e-2 each, moments to 2^-8
    assert all(p.dtype == torch.float32 for p in half.model.parameters()), "the master weights stay in FP32"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_recomputing_changes_no_bit_of_a_step(compute) -> None:
    def run(**fields) -> tuple[dict[str, torch.Tensor], list[float]]:
        config = dataclasses.replace(CONFIG, compute=compute, **fields)
        found = Trainer(build_model(SPEC, config), config)
        losses = [found.step(batch(step)).loss for step in range(2)]
        return found.model.state_dict(), losses

    plain, losses = run()
    again, same = run(recompute=("norm", "up_projection", "swiglu"))
    assert losses == same
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_matrices_decay_and_norms_do_not() -> None:
    """With gradients of zero a step is weight decay alone."""
    found = trainer(optimizer=OptimizerConfig(lr=0.5, lr_schedule="constant", weight_decay=0.5, warmup_steps=0))
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    for parameter in found.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found.optimizer.step(found.masters.tensors, found.masters.gradients(), 0.5)
    for name, parameter in found.model.named_parameters():
        factor = 1.0 if name.endswith("norm.weight") else 0.75
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-12, atol=0, msg=name)


def test_biases_move_once_a_step_by_gamma() -> None:
    found = trainer(micro_batch_size=1, balance=BalanceConfig(bias_speed=0.25), recompute=("norm", "swiglu"))
    found.step(batch())
    biases = torch.cat([b for n, b in found.model.named_buffers() if n.endswith("bias_E")])
    assert set(biases.abs().tolist()) <= {0.0, 0.25}
    assert float(biases.abs().max()) == 0.25


def test_average_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late its thread comes to add: not before someone waits for it."""
    waited_for, add, wait = threading.Event(), HostAverage._add, HostAverage.wait

    def wait_for(average: HostAverage) -> None:
        waited_for.set()
        wait(average)
        waited_for.clear()

    monkeypatch.setattr(HostAverage, "_add", lambda average: add(average) if waited_for.wait(60) else None)
    monkeypatch.setattr(HostAverage, "wait", wait_for)
    found = trainer(ema_decay=0.5)
    wanted = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    for step in range(3):
        found.step(batch(step))
        for name, parameter in found.model.named_parameters():
            wanted[name] = 0.5 * (wanted[name] + parameter.detach())
    tensors = found.tensors()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[f"average/{name}"], tensor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_restored_trainer_goes_on_bit_for_bit(compute) -> None:
    optimizer = dataclasses.replace(CONFIG.optimizer, moments="bfloat16")
    config = dataclasses.replace(CONFIG, steps=6, compute=compute, ema_decay=0.9, optimizer=optimizer)
    whole = Trainer(build_model(SPEC, config), config)
    for step in range(3):
        whole.step(batch(step))
    whole.alarm.dry[1] = [3, 0, 2, 0]
    tensors, fields = {name: t.clone() for name, t in whole_state(whole).items()}, whole.fields()
    torch.manual_seed(99)
    other = Trainer(build_model(SPEC, dataclasses.replace(config, seed=5)), config)
    mine = whole_state(other)
    assert mine.keys() == tensors.keys()
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])
    other.restore(fields, mine["generator/torch"])
    assert other.fields() == fields
    assert torch.equal(torch.get_rng_state(), tensors["generator/torch"])
    for step in range(3, 6):
        first, second = whole.step(batch(step)), other.step(batch(step))
        assert (first.loss, first.lr, first.grad_norm) == (second.loss, second.lr, second.grad_norm)
    ends = whole_state(whole), whole_state(other)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert {**whole.fields(), "seconds": 0} == {**other.fields(), "seconds": 0}


def _fault(found: Trainer) -> str:
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    with pytest.raises(TrainingFault) as fault:
        found.step(batch())
    assert fault.value.step == 0
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or tensor.isnan().any() or tensor.isinf().any(), name
    return str(fault.value)


def test_a_loss_that_is_not_finite_names_the_layer_and_changes_nothing() -> None:
    found = trainer()
    with torch.no_grad():
        found.model.get_parameter("layers.1.ffn_norm.weight").fill_(1e308)
    message = _fault(found)
    assert message.startswith("step 0: the loss is nan") and "the output of layer 1 is the first" in message


def test_a_parameter_that_is_not_finite_is_named() -> None:
    found = trainer()
    with torch.no_grad():
        found.model.get_parameter("layers.0.ffn.down.weight")[3, 4] = float("nan")
    assert "the parameter layers.0.ffn.down.weight is not finite" in _fault(found)


def test_a_gradient_that_explodes_stops_the_run() -> None:
    """The largest gradient is named with the norm that it had, not what clipping would have left of it."""
    found = trainer(optimizer=dataclasses.replace(CONFIG.optimizer, largest_norm=1e-3, clip=1e-5))
    message = _fault(found)
    norms = [float(number) for number in re.findall(r"norm of ([\d.e+-]+)(?=;)", message)]
    assert len(norms) == 2 and norms[1] <= norms[0] < 10 * norms[1], message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gradient_that_is_not_finite_is_named(value) -> None:
    """In the middle of the backward, all other gradients being finite."""
    found = trainer(micro_batch_size=2)
    name = "layers.1.attention.kv_b.weight"
    found.model.get_parameter(name).register_hook(lambda gradient: gradient * value)
    assert f"the gradient of {name} is the first that is not finite" in _fault(found)


def test_with_recipe_shares_parameters() -> None:
    model = build_model(SPEC, dataclasses.replace(CONFIG, compute="bfloat16"))
    other = with_recipe(model, Recipe())
    tokens = torch.from_numpy(batch().tokens_BX[:, :8])
    assert model(tokens).dtype == torch.bfloat16 and other(tokens).dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].data_ptr() == tensor.data_ptr(), name


def test_losses_over_devices_are_refused_for_a_model_without_groups() -> None:
    spec = dataclasses.replace(SPEC, moe=dataclasses.replace(MOE, num_groups=1, num_kept_groups=1))
    config = dataclasses.replace(CONFIG, balance=BalanceConfig(communication_alpha=0.1))
    with pytest.raises(ValueError, match=r"communication_alpha is 0\.1"):
        Trainer(build_model(spec, config), config)
