"""Training in FP8: whole and cut the same bits, resumed exactly, and stopped by a tile that is not finite."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.kernels.fp8_tiles import quantise
from abyssal.model.context import PackedBatch
from abyssal.model.dispatch import LocalDispatcher, start_dispatch
from abyssal.model.experts import Experts
from abyssal.model.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from abyssal.model.stages import STAGES, StageIO, StageRun
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear
from abyssal.precision.recipe import Fp8Options, Recipe, fp8_recipe
from abyssal.spec.placement import Placement
from abyssal.spec.tile_format import TileFormat
from abyssal.train.bad_tiles import describe_bad_tiles
from abyssal.train.config import OptimizerConfig, TrainConfig
from abyssal.train.fault import TrainingFault
from abyssal.train.loop import build_model, training_recipe
from abyssal.train.loss import training_loss
from abyssal.train.step import Trainer
from tests.support.checkpoints import SMALL, random_model
from tests.support.whole_state import whole_state

SPEC = dataclasses.replace(SMALL, init_std=0.1)
CONFIG = TrainConfig(
    steps=6, seq_len=8, batch_size=4, precision="fp8", optimizer=OptimizerConfig(lr=1e-2), validate_every=2
)


def batch(seed: int = 0) -> Batch:
    return Batch(np.random.default_rng(seed).integers(0, SPEC.vocab_size, (4, 8 + 2)))


def trainer(**fields) -> Trainer:
    config = dataclasses.replace(CONFIG, **fields)
    return Trainer(build_model(SPEC, config), config)


def gradients(recipe: Recipe, parts: int = 1) -> dict[str, Tensor]:
    """Of one pass over the batch, in ``parts`` micro-batches."""
    model = Transformer(SPEC, recipe)
    model.init_weights(torch.Generator().manual_seed(0))
    for part in batch().parts(4 // parts):
        training_loss(model, part, 0.3, None, [32, 32]).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def test_precision_fp8_is_the_paper_s_recipe_with_bf16_activations() -> None:
    assert training_recipe(SPEC, CONFIG) == fp8_recipe()
    assert training_recipe(SPEC, dataclasses.replace(CONFIG, compute="float32")) == fp8_recipe(activations="float32")
    options = Fp8Options(high_precision=("kv_b",), scales="float32")
    found = training_recipe(SPEC, dataclasses.replace(CONFIG, fp8=options, recompute=("norm",)))
    assert found == fp8_recipe(options, recompute=("norm",)) and found.product("kv_b").fp8 is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"precision": "fp4"}, "precision is 'fp4'"),
        ({"compute": "float64"}, "precision is fp8 and compute float64"),
        ({"precision": "compute", "fp8": Fp8Options(scales="float32")}, "precision fp8"),
        ({"model_format": "fp8", "fp8": Fp8Options(granularity="tensor")}, "model_format bf16 or fp32"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CONFIG, **fields)  # type: ignore[arg-type]


def test_a_product_that_the_model_lacks_is_refused_before_training() -> None:
    config = dataclasses.replace(CONFIG, fp8=Fp8Options(high_precision=("q",)))
    with pytest.raises(ValueError, match=r"names q, which this model doesn't have; choose among .*q_a"):
        config.check_fits(SPEC)
    dataclasses.replace(CONFIG, fp8=Fp8Options(high_precision=("q_a", "shared.down"))).check_fits(SPEC)


def test_gradients_are_those_of_bf16_but_for_the_format() -> None:
    """About 4 % a product from two operands of three mantissa bits, and some twenty products in a row."""
    exact = gradients(Recipe(activations="float32"))
    bf16, fp8 = (error(gradients(recipe), exact) for recipe in (Recipe(activations="bfloat16"), fp8_recipe()))
    assert max(bf16.values()) < 0.05 < min(fp8.values()) and max(fp8.values()) < 0.04 * 20**0.5 * 2


def test_cut_stages_equal_the_whole_layer_bit_for_bit() -> None:
    model = Transformer(SPEC, fp8_recipe())
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    # Of many magnitudes: values alike come back the same whichever of their tiles they were rounded in.
    normal = (torch.randn(24, SPEC.hidden_size, generator=generator) for _ in range(4))
    x_TD, gradient_TD = ((next(normal) * (3 * next(normal)).exp()).bfloat16() for _ in range(2))
    for block in model.blocks():
        leaf = x_TD.clone().requires_grad_()
        block(leaf, model.step(PackedBatch([12, 12]))).backward(gradient_TD)
        whole = {name: parameter.grad for name, parameter in block.named_parameters()}
        block.zero_grad()
        runs, io, step = [], StageIO(x_TD), model.step(PackedBatch([12, 12]))
        for name in STAGES:
            runs.append(StageRun(name, block, step))
            io = runs[-1].forward(io)
        back = {"x_TD": gradient_TD}
        for run in reversed(runs):
            back = run.backward_input(back)
        assert leaf.grad is not None and torch.equal(back["x_TD"], leaf.grad)
        for run in runs:
            run.backward_weight()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None and torch.equal(parameter.grad, whole[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [Fp8Options(), Fp8Options(high_precision=("q_a", "shared.down", "dense.gate_up"))])
def test_recomputing_changes_no_bit_but_where_codes_are_all_that_is_kept(options: Fp8Options) -> None:
    wanted, got = gradients(fp8_recipe(options)), gradients(fp8_recipe(options, recompute=("norm", "swiglu")))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    # Keys and values are made again from the latent's codes, which is what the first time multiplied too.
    again = gradients(fp8_recipe(options, recompute=("up_projection",)))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_accumulation_of_micro_batches_is_near() -> None:
    """Tiles over tokens are other ones, so the last codes differ, and no more."""
    assert max(error(gradients(fp8_recipe(), parts=4), gradients(fp8_recipe())).values()) < 0.1


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    whole, stopped = trainer(), trainer()
    for step in range(3):
        whole.step(batch(step))
        stopped.step(batch(step))
    tensors = {name: tensor.clone() for name, tensor in whole_state(stopped).items()}
    other = trainer()
    for name, tensor in whole_state(other).items():
        tensor.copy_(tensors[name])
    other.restore(stopped.fields(), tensors["generator/torch"])
    for step in range(3, 6):
        assert whole.step(batch(step)).loss == other.step(batch(step)).loss
    assert all(torch.equal(tensor, whole_state(other)[name]) for name, tensor in whole_state(whole).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tile_that_is_not_finite_stops_the_step_and_is_counted(value: float) -> None:
    found = trainer()
    found.model.get_submodule("layers.1.attention_norm").register_forward_hook(
        lambda _, __, output: output.index_put((torch.tensor([5]), torch.tensor([130])), torch.tensor(value).bfloat16())
    )
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    with pytest.raises(TrainingFault, match="the output of layer 1 is the first that is not finite") as fault:
        found.step(batch())
    assert "FP8 tiles hold an infinity or a NaN, the first 1 in the input of layers.1.attention.kv_a" in str(
        fault.value
    ) or "the first 1 in the input of layers.1.attention.q_a" in str(fault.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.model.state_dict().items())


def test_bad_tiles_at_experts_are_counted_in_each_of_their_products() -> None:
    moe = SPEC.moe
    assert moe is not None
    model = build_model(dataclasses.replace(SPEC, moe=dataclasses.replace(moe, num_shared_experts=0)), CONFIG)
    assert describe_bad_tiles(model, batch()) is None
    experts = model.get_submodule("layers.1.ffn.experts")
    with torch.no_grad():
        experts.get_parameter("w_gate_up_EFD").fill_(1e19)  # gate x up is beyond FP32, and each of them is not
    assert re.search(
        r"the first \d+ in the input of layers\.1\.ffn\.experts\.down$", describe_bad_tiles(model, batch()) or ""
    )
    model.get_submodule("layers.1.ffn_norm").register_forward_hook(
        lambda _, __, output: output.index_put(
            (torch.tensor([5]), torch.tensor([130])), torch.tensor(float("inf")).bfloat16()
        )
    )
    found = describe_bad_tiles(model, batch())
    assert found is not None and "the first 2 in the input of layers.1.ffn.experts.gate_up" in found  # a row a choice
    assert {"gate_up", "down"}.isdisjoint(vars(experts))


class Watched(LocalDispatcher):
    """Notes what is sent."""

    def __init__(self, placements: dict[int, Placement]) -> None:
        super().__init__(placements)
        self.sent: list[torch.dtype] = []
        self.combined: list[torch.dtype] = []

    def start_dispatch(self, x_TD, weights_TK, plan):  # type: ignore[no-untyped-def]
        self.sent.append(x_TD.dtype)
        return super().start_dispatch(x_TD, weights_TK, plan)

    def start_combine(self, rows_AD, weights_A, plan):  # type: ignore[no-untyped-def]
        self.combined.append(rows_AD.dtype)
        return super().start_combine(rows_AD, weights_A, plan)


def test_tokens_and_gradients_are_sent_in_fp8_and_summed_in_bf16() -> None:
    model = Transformer(SPEC, fp8_recipe())
    model.init_weights(torch.Generator().manual_seed(0))
    dispatcher = Watched(model.placements())
    x_TD = torch.randn(8, SPEC.hidden_size).bfloat16().requires_grad_()
    model.blocks()[1](x_TD, model.step(PackedBatch([8]), dispatcher)).float().sum().backward()
    assert dispatcher.sent == [torch.uint8, torch.uint8]
    assert dispatcher.combined == [torch.bfloat16, torch.bfloat16]


def test_gate_and_up_have_tiles_of_their_own() -> None:
    """Whatever size the gate has, up and its gradient are rounded as if it were not there."""
    model = Transformer(SPEC, fp8_recipe(activations="float32"))
    model.init_weights(torch.Generator().manual_seed(0))
    experts = model.get_submodule("layers.1.ffn.experts")
    assert isinstance(experts, Experts) and experts.w_gate_up_EFD.shape[1] == 60  # both halves within 128
    rows_AD, counts, step = torch.randn(9, SPEC.hidden_size), [4, 0, 3, 2], model.step(PackedBatch([9]))

    def up_and_gradients(size: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            experts.w_gate_up_EFD[:, :30] = size
        gradient = torch.cat([torch.full((9, 30), size), torch.linspace(-1, 1, 270).view(9, 30).exp()], 1)
        experts.zero_grad()
        out = experts.gate_up(rows_AD, counts, step)
        out.backward(gradient)
        assert experts.w_gate_up_EFD.grad is not None
        leaf = rows_AD.clone().requires_grad_()
        with torch.no_grad():
            experts.w_gate_up_EFD[:, :30] = 0  # then the rows' gradient is up's alone
        experts.gate_up(leaf, counts, step).backward(gradient)
        assert leaf.grad is not None
        return out[:, 30:].detach(), experts.w_gate_up_EFD.grad[:, 30:].clone(), leaf.grad

    small, large = up_and_gradients(1e-3), up_and_gradients(1e6)
    assert all(torch.equal(one, other) for one, other in zip(small, large, strict=True))


def test_what_arrives_is_what_was_quantised() -> None:
    form = TileFormat("e4m3", "1x128", "ue8m0")
    dispatcher = LocalDispatcher({1: Placement.identity(4)})
    x_TD = torch.randn(9, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    plan = dispatcher.plan(1, torch.randint(0, 4, (9, 2), generator=torch.Generator().manual_seed(2)))
    rows = start_dispatch(dispatcher, x_TD, None, plan, form).wait()
    sent = quantise(x_TD, form).values(torch.bfloat16)
    assert torch.equal(rows.values_AD, sent[plan.order_A // 2]) and rows.codes is not None
    assert torch.equal(rows.codes.values(torch.bfloat16), rows.values_AD)


def test_adapters_train_beside_products_in_fp8() -> None:
    model = random_model(SPEC)
    other = Transformer(SPEC, fp8_recipe(), device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    add_lora(other, LoraConfig(rank=4, targets=("attention", "experts", "ffn")), torch.Generator().manual_seed(0))
    training_loss(other, batch(), 0.3).total.backward()
    found = lora_parameters(other)
    assert all(parameter.grad is not None for name, parameter in found.items() if name.endswith("lora_b"))
    assert all(parameter.grad is None for name, parameter in other.named_parameters() if name not in found)


def test_an_adapter_s_effective_weight_is_what_is_multiplied_and_merging_rounds_nothing() -> None:
    model = Transformer(SPEC, fp8_recipe())
    model.init_weights(torch.Generator().manual_seed(0))
    kv_b = model.get_submodule("layers.0.attention.kv_b")
    assert isinstance(kv_b, Linear)
    exact, read = kv_b.weight.detach().clone(), kv_b.effective_weight().detach()
    add_lora(model, LoraConfig(rank=4), torch.Generator().manual_seed(0))
    assert not torch.equal(exact, read) and torch.equal(kv_b.effective_weight().detach(), read)  # B is zero yet
    merge_lora(model)
    assert torch.equal(kv_b.weight, exact)


def test_recomputing_changes_no_bit_of_the_adapters_gradients() -> None:
    """They read their input as it is, so what is made again of queries and keys must, too."""

    def adapters(recipe: Recipe) -> dict[str, Tensor]:
        model = Transformer(SPEC, recipe)
        model.init_weights(torch.Generator().manual_seed(0))
        add_lora(model, LoraConfig(rank=4, targets=("attention", "experts", "ffn")), torch.Generator().manual_seed(0))
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        training_loss(model, batch(), 0.3).total.backward()
        return {name: p.grad for name, p in lora_parameters(model).items() if p.grad is not None}

    wanted, got = adapters(fp8_recipe()), adapters(fp8_recipe(recompute=("norm", "up_projection", "swiglu")))
    assert wanted.keys() == got.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_small_model_learns_as_in_bf16() -> None:
    """The same rows again and again: the losses on the way down, added up."""
    sums = {}
    for precision in ("compute", "fp8"):
        found = trainer(compute="bfloat16", precision=precision, steps=12, optimizer=OptimizerConfig(lr=3e-3))
        losses = [found.step(batch()).loss for _ in range(12)]
        assert losses[-1] < 0.01 * losses[0]
        sums[precision] = sum(losses)
    assert sums["fp8"] != sums["compute"] and sums["fp8"] == pytest.approx(sums["compute"], rel=0.1)
