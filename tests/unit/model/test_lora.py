"""Adapters beside the same model with W + (α/r) B A made whole, and what they leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.model.context import PackedBatch
from abyssal.model.lora import (
    AdaptedExperts,
    AdaptedLinear,
    LoraConfig,
    Target,
    adapted_modules,
    add_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
)
from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy
from abyssal.precision.linear import WeightQueue
from abyssal.precision.recipe import Recipe, Recomputed
from abyssal.spec.model import Family, ModelSpec
from abyssal.spec.placement import Placement
from tests.support.cached import CachedSequence
from tests.support.parity import draw_spec, moe_of, random_model, random_tokens, relative_difference

EVERYTHING: tuple[Target, ...] = ("attention", "experts", "ffn")
BOTH_FACTORS = LoraConfig(3, 5.0, EVERYTHING)


def small(family: Family = "deepseek_v3", seed: int = 1) -> ModelSpec:
    return replace(draw_spec(family, seed), mtp_depth=1 if family == "deepseek_v3" else 0)


def adapted(model: Transformer, config: LoraConfig = BOTH_FACTORS, seed: int = 0) -> Transformer:
    """With adapters of which neither factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, config, generator)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_b"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def objective(model: Transformer, tokens_BX: Tensor, queue: WeightQueue | None = None) -> Tensor:
    """Cross-entropy of the next token, and of the one after where there is an MTP module."""
    length = tokens_BX.shape[1] - 2
    step = model.step(PackedBatch([length] * len(tokens_BX)), queue=queue)
    hidden_TD = model.hidden(tokens_BX[:, :length].flatten(), step)
    entry, targets_T = model.recipe.product("head"), tokens_BX[:, 1 : length + 1].flatten()
    loss = linear_cross_entropy(hidden_TD, model.head_weight, targets_T, entry) / len(targets_T)
    if len(model.mtp):
        hidden_TD = model.mtp_hidden(0, targets_T, hidden_TD, step)
        further_T = tokens_BX[:, 2 : length + 2].flatten()
        loss = loss + 0.3 * linear_cross_entropy(hidden_TD, model.head_weight, further_T, entry) / len(targets_T)
    return loss


def dense_gradients(model: Transformer, tokens_BX: Tensor) -> dict[str, Tensor]:
    """The adapters' gradients from those of W' = W + s B A, made whole: dA = s Bᵀ dW', dB = s dW' Aᵀ."""
    whole = deepcopy(model)
    merge_lora(whole)
    objective(whole, tokens_BX).backward()
    gradients = {}
    for name, module in adapted_modules(model).items():
        for weight, prefix in module.weights.items():
            a, b = (factor.detach() for factor in module.adapter(weight))
            dweight = whole.get_parameter(f"{name}.{weight}").grad
            assert dweight is not None
            gradients[f"{name}.{prefix}lora_a"] = module.lora_scale * b.mT @ dweight
            gradients[f"{name}.{prefix}lora_b"] = module.lora_scale * dweight @ a.mT
    return gradients


def assert_gradients(model: Transformer, expected: dict[str, Tensor], bound: float = 1e-10) -> None:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_difference(found[name], gradient) < bound, name


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize(("family", "seed"), [("deepseek_v3", 1), ("deepseek_v3", 3), ("deepseek_v2", 2), ("llama", 0)])
def test_gradients_are_those_of_the_whole_weight(family: Family, seed: int, queued: bool) -> None:
    spec = small(family, seed)
    model = adapted(random_model(spec, dtype=torch.float64))
    tokens = random_tokens(spec, 3, 14)
    queue = WeightQueue() if queued else None
    objective(model, tokens, queue).backward()
    if queue is not None:
        assert all(parameter.grad is None for parameter in model.parameters())
        assert len(queue) == len(lora_parameters(model))  # and none for a frozen weight
        queue.run()
    assert_gradients(model, dense_gradients(model, tokens))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
@torch.no_grad()
def test_merged_model_gives_the_adapted_logits(family: Family) -> None:
    spec = small(family)
    model = adapted(random_model(spec, dtype=torch.float64))
    names, tokens = set(random_model(spec).state_dict()), random_tokens(spec, 2, 15)
    before, expected = random_model(spec, dtype=torch.float64)(tokens), model(tokens)
    merge_lora(model)
    assert relative_difference(model(tokens), expected) < 1e-12
    assert relative_difference(expected, before) > 0.1
    assert set(model.state_dict()) == names and not adapted_modules(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_merge_adds_in_fp32_and_rounds_once() -> None:
    model = adapted(random_model(small(), dtype=torch.bfloat16))
    linear, experts = model.get_submodule("layers.1.attention.kv_b"), moe_of(model, 1).experts
    assert isinstance(linear, AdaptedLinear) and isinstance(experts, AdaptedExperts)
    (a, b), (down_a, down_b) = linear.adapter("weight"), experts.adapter("w_down_EDF")
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    expected = (linear.weight.float() + b @ a * (5 / 3)).bfloat16()
    stacked = experts.w_down_EDF.float() + down_b @ down_a * (5 / 3)
    merge_lora(model)
    assert torch.equal(linear.get_parameter("weight"), expected)
    assert relative_difference(experts.w_down_EDF.float(), stacked) < 2**-8


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_follow_the_generator() -> None:
    spec = small()
    models = [random_model(spec) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        add_lora(model, LoraConfig(4, 8), torch.Generator().manual_seed(seed))
    tokens = random_tokens(spec, 2, 12)
    assert torch.equal(models[0](tokens), random_model(spec)(tokens))
    first, again, other = (lora_parameters(model) for model in models)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert bool(parameter.any()) == name.endswith("lora_a")
        assert torch.equal(parameter, other[name]) != name.endswith("lora_a")


TARGETS: list[tuple[LoraConfig, int]] = [
    (LoraConfig(2, 2, ("attention",)), 3 * 5),
    (LoraConfig(2, 2, ("experts",)), 2),
    (LoraConfig(2, 2, ("ffn",)), 3 * 2),
    (LoraConfig(2, 2, EVERYTHING, mtp=False), 2 * 5 + 1 + 2 * 2),
]


@pytest.mark.parametrize(("config", "count"), TARGETS)
def test_targets(config: LoraConfig, count: int) -> None:
    spec = replace(small(), num_layers=2, num_dense_layers=1)
    model = random_model(spec)
    names = set(model.state_dict())
    add_lora(model, config, torch.Generator())
    adapters = lora_parameters(model)
    assert len(adapted_modules(model)) == count
    assert set(model.state_dict()) == names | adapters.keys()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapters.keys()
    assert any(name.startswith("mtp.") for name in adapters) == config.mtp
    for name in adapters:
        part = {"attention": ".attention.", "experts": ".experts.", "ffn": ".ffn."}
        assert any(part[target] in name for target in config.targets)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 2.0}, {"alpha": 0.0}, {"targets": ()}, {"targets": ("head",)}])
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(bad))} is"):
        LoraConfig(**bad)


def test_adapters_twice_or_on_nothing_are_refused() -> None:
    model = random_model(small("llama", 0))
    with pytest.raises(ValueError, match=r"lora\.targets is \('experts',\): the model has none"):
        add_lora(model, LoraConfig(targets=("experts",)), torch.Generator())
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, LoraConfig(), torch.Generator())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoraConfig(), torch.Generator())
    remove_lora(model)
    assert not lora_parameters(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_training_steps_leave_the_base_bit_for_bit() -> None:
    spec = small()
    model = random_model(spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoraConfig(4, 8, EVERYTHING), torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    tokens, losses = random_tokens(spec, 4, 16), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class MadeShapes(TorchDispatchMode):
    """The shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.shapes.add(tuple(result.shape))
        return result


def test_no_gradient_of_a_frozen_weight_is_made() -> None:
    """Neither kept nor computed and thrown away: nothing of a base weight's shape is made in forward and backward."""
    spec = replace(small(), num_layers=2, num_dense_layers=1, vocab_size=89, tie_embeddings=False)
    tokens = random_tokens(spec, 1, 103)  # 101 rows, which no weight has
    seen = {}
    for lora in (False, True):
        model = random_model(spec)
        weights = {tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1}
        if lora:
            adapted(model, LoraConfig(2, 2, EVERYTHING))
        with MadeShapes() as made:
            objective(model, tokens).backward()
        seen[lora] = weights & made.shapes
        frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
        assert bool(frozen) == lora and all(model.get_parameter(name).grad is None for name in frozen)
    assert len(seen[False]) > 8 and not seen[True]


def test_replicas_of_an_expert_share_its_adapter() -> None:
    spec = small()
    tokens, layer, moe = random_tokens(spec, 2, 14), 1, spec.moe
    assert moe is not None
    slots = (*reversed(range(moe.num_experts)), 0, 0, 2)
    plain, replicated = (
        random_model(spec, dtype=torch.float64),
        Transformer(spec, placements={layer: Placement(moe.num_experts, slots)}, dtype=torch.float64),
    )
    state = plain.state_dict()
    for name in ("w_gate_up_EFD", "w_down_EDF"):
        key = f"layers.{layer}.ffn.experts.{name}"
        state[key] = state[key][list(slots)]
    replicated.load_state_dict(state)
    losses = []
    for model in (adapted(plain), adapted(replicated)):
        losses.append(objective(model, tokens))
        losses[-1].backward()
    assert relative_difference(losses[1], losses[0]) < 1e-12
    gradients = {name: parameter.grad for name, parameter in lora_parameters(plain).items()}
    assert_gradients(replicated, {name: gradient for name, gradient in gradients.items() if gradient is not None})

    experts, whole = moe_of(replicated, layer).experts, moe_of(plain, layer).experts
    moved = (slots[1], slots[0], *slots[2:])
    weights = {slot: (experts.w_gate_up_EFD[1 - slot].clone(), experts.w_down_EDF[1 - slot].clone()) for slot in (0, 1)}
    experts.load_slots(Placement(moe.num_experts, moved), weights)
    assert relative_difference(objective(replicated, tokens), losses[0]) < 1e-12
    merge_lora(plain)
    merge_lora(replicated)
    for slot, expert in enumerate(moved):
        assert torch.equal(experts.w_down_EDF[slot], whole.w_down_EDF[expert])


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_absorbed_attention_sees_the_adapter(family: Family) -> None:
    """Without a cache, with its gradients; and from a cache, token by token."""
    spec = small(family)
    model = adapted(random_model(spec, dtype=torch.float64), LoraConfig(3, 5.0, ("attention",)))
    tokens = random_tokens(spec, 1, 9)[0]
    results, gradients = [], []
    for absorbed in (False, True):
        step = model.step(PackedBatch([9], absorbed=absorbed), queue=WeightQueue() if absorbed else None)
        results.append(model.logits(model.hidden(tokens, step)))
        results[-1].square().sum().backward()
        if step.queue is not None:
            step.queue.run()
        found = {name: parameter.grad for name, parameter in lora_parameters(model).items()}
        gradients.append({name: gradient.clone() for name, gradient in found.items() if gradient is not None})
        model.zero_grad()
    assert relative_difference(results[1], results[0]) < 1e-10
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_difference(gradients[1][name], gradient) < 1e-9, name

    cache = CachedSequence(spec, 9, torch.float64)
    with torch.no_grad():
        steps = [model.hidden(token[None], model.step(cache.extend(1, absorbed=True))) for token in tokens]
        assert relative_difference(model.logits(torch.cat(steps)), results[0]) < 1e-10


@pytest.mark.parametrize("targets", [EVERYTHING, ("experts",)])
def test_forgotten_activations_come_back_for_adapters(targets: tuple[Target, ...]) -> None:
    """Bit for bit; also where the first layers have nothing to train and no gradient reaches them."""
    spec = replace(small(), num_layers=3, num_dense_layers=1)
    tokens, gradients = random_tokens(spec, 2, 16), []
    for recompute in (frozenset[Recomputed](), frozenset[Recomputed](("norm", "up_projection", "swiglu"))):
        model = Transformer(spec, Recipe(recompute=recompute))
        model.load_state_dict(random_model(spec).state_dict())
        objective(adapted(model, LoraConfig(3, 5.0, targets)), tokens).backward()
        gradients.append({name: parameter.grad for name, parameter in lora_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradients[1][name], gradient), name
