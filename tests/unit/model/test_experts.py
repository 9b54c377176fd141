"""Routing, dispatch and expert slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.model.context import PackedBatch
from abyssal.model.dispatch import LocalDispatcher, SlotMap
from abyssal.model.experts import Experts
from abyssal.model.router import choose, gate, scores
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec, MoESpec
from abyssal.spec.placement import Placement
from tests.support.parity import draw_spec, moe_of, random_model, random_tokens, relative_difference
from tests.support.specs import specs


@settings(max_examples=40, deadline=None)
@given(specs())
def test_arithmetic_counts_the_elements_of_the_module(spec: ModelSpec) -> None:
    model = Transformer(spec, device="meta")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mtp = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("mtp."))
    assert sum(tensor.numel() for tensor in tensors.values()) - mtp == spec.total_parameters
    assert mtp == spec.mtp_parameters


def slow_choice(scores_E: list[float], bias_E: list[float], moe: MoESpec) -> set[int]:
    """The definition, in plain Python: groups by their score, then the best experts of the kept groups."""
    biased = [score + bias for score, bias in zip(scores_E, bias_E, strict=True)]
    size = moe.num_experts // moe.num_groups
    groups = [list(range(start, start + size)) for start in range(0, moe.num_experts, size)]

    def group_score(group: list[int]) -> float:
        best = sorted((biased[expert] for expert in group), reverse=True)
        return sum(best[:2]) if moe.scoring == "sigmoid" else best[0]

    kept = sorted(groups, key=group_score, reverse=True)[: moe.num_kept_groups]
    allowed = [expert for group in kept for expert in group]
    return set(sorted(allowed, key=lambda expert: biased[expert], reverse=True)[: moe.top_k])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (4, 4), (2, 1)])
def test_choice_is_that_of_the_definition(scoring: str, groups: int, kept: int) -> None:
    moe = MoESpec(16, 1, 4, 8, groups, kept, scoring, True, 2.5, scoring == "sigmoid")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    scores_TE = scores(torch.randn(50, 16, generator=generator), moe)
    bias_E = 0.3 * torch.randn(16, generator=generator) if moe.correction_bias else None
    ids_TK = choose(scores_TE, bias_E, moe)
    bias = [0.0] * 16 if bias_E is None else bias_E.tolist()
    for row, ids in zip(scores_TE.tolist(), ids_TK.tolist(), strict=True):
        assert set(ids) == slow_choice(row, bias, moe)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_a_dropped_group_is_never_chosen_however_low_the_kept_ones(shift: float) -> None:
    """Biases push every score below zero, so a mask of zero would lift the dropped groups above the kept."""
    moe = MoESpec(16, 1, 4, 8, 4, 2)
    generator = torch.Generator().manual_seed(0)
    scores_TE = scores(torch.randn(50, 16, generator=generator), moe)
    bias_E = shift + 0.3 * torch.randn(16, generator=generator)
    for row, ids in zip(scores_TE.tolist(), choose(scores_TE, bias_E, moe).tolist(), strict=True):
        assert set(ids) == slow_choice(row, bias_E.tolist(), moe)


def test_gate_uses_unbiased_scores_renormalised_and_scaled() -> None:
    moe = MoESpec(8, 1, 3, 8, route_scale=2.5)
    scores_TE = torch.rand(5, 8)
    ids_TK = torch.tensor([[0, 3, 5]] * 5)
    weights_TK = gate(scores_TE, ids_TK, moe)
    chosen = scores_TE[:, [0, 3, 5]]
    assert torch.allclose(weights_TK, 2.5 * chosen / chosen.sum(1, keepdim=True))
    plain = gate(scores_TE, ids_TK, replace(moe, renormalise=False))
    assert torch.allclose(plain, 2.5 * chosen)


def test_forced_routing_replaces_the_choice_and_keeps_the_gate() -> None:
    spec = draw_spec("deepseek_v3", 1)
    model = random_model(spec, dtype=torch.float64)
    tokens = random_tokens(spec, 1, 12)[0]
    free = model.step(PackedBatch([12]))
    hidden = model.hidden(tokens, free)
    forced = {layer: routing.expert_ids_TK for layer, routing in free.routings.items()}
    replayed = model.step(PackedBatch([12]), forced_routing=forced)
    assert torch.equal(model.hidden(tokens, replayed), hidden)
    other = {layer: (ids + 1) % spec.moe.num_experts for layer, ids in forced.items()}  # type: ignore[union-attr]
    changed = model.step(PackedBatch([12]), forced_routing=other)
    assert relative_difference(model.hidden(tokens, changed), hidden) > 0.01
    assert all(torch.equal(changed.routings[layer].expert_ids_TK, ids) for layer, ids in other.items())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_combine_is_the_adjoint_of_dispatch(data: st.DataObject) -> None:
    """<dispatch x, y> = <x, combine y> for any routing: what each backward rests on."""
    tokens, experts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, experts))
    extra = data.draw(st.lists(st.integers(0, experts - 1), max_size=4))
    placement = Placement(experts, (*range(experts), *extra))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids_TK = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    dispatcher = LocalDispatcher({0: placement})
    plan = dispatcher.plan(0, ids_TK)
    x, w, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, 3), (tokens, top_k), (tokens * top_k, 3))
    )
    rows, weights = dispatcher.start_dispatch(x, w, plan).wait()
    sums, weights_back = dispatcher.start_combine(y, weights, plan).wait()
    assert torch.allclose((rows * y).sum(), (x * sums).sum())
    assert weights_back is not None and torch.equal(weights_back, w)
    slots = SlotMap(placement)(ids_TK).flatten()[plan.order_A]
    assert torch.equal(slots, slots.sort().values)
    assert [placement.slots[slot] for slot in slots.tolist()] == ids_TK.flatten()[plan.order_A].tolist()
    assert sum(plan.counts) == tokens * top_k


def test_combine_adds_in_fp32_and_rounds_once() -> None:
    dispatcher = LocalDispatcher({0: Placement.identity(4)})
    plan = dispatcher.plan(0, torch.tensor([[0, 1, 2, 3]]))
    rows_AD = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    sums_TD, _ = dispatcher.start_combine(rows_AD, None, plan).wait()
    assert sums_TD.dtype == torch.bfloat16 and sums_TD.item() == 1 + 2.0**-7  # BF16 sums would stay at 1


def test_replicas_share_the_tokens_of_their_expert() -> None:
    slot_map = SlotMap(Placement(2, (0, 1, 0, 0)))
    slots_T = slot_map(torch.zeros(30, 1, dtype=torch.long)).flatten()
    assert torch.bincount(slots_T, minlength=4).tolist() == [10, 0, 10, 10]


def with_placement(model: Transformer, placement: Placement) -> Transformer:
    """A copy of ``model`` whose experts lie as ``placement`` says."""
    moved = Transformer(model.spec, placements={k: placement for k in model.placements()}, dtype=torch.float64)
    state = model.state_dict()
    for name in list(state):
        if ".experts.w_" in name:
            state[name] = state[name][list(placement.slots)]
    moved.load_state_dict(state)
    return moved


def test_replicas_change_nothing() -> None:
    spec = draw_spec("deepseek_v3", 1)
    assert spec.moe is not None
    model = random_model(spec, dtype=torch.float64)
    count = spec.moe.num_experts
    slots = (*reversed(range(count)), 0, 0, count - 1)
    moved = with_placement(model, Placement(count, slots))
    tokens = random_tokens(spec, 2, 30)
    expected, actual = model(tokens), moved(tokens)
    assert relative_difference(actual, expected) < 1e-10
    expected.square().sum().backward()
    actual.square().sum().backward()
    for layer in model.placements():
        for name in ("w_gate_up_EFD", "w_down_EDF"):
            whole, replicated = (getattr(moe_of(m, layer).experts, name).grad for m in (model, moved))
            summed = torch.zeros_like(whole).index_add_(0, torch.tensor(slots), replicated)
            assert relative_difference(summed, whole) < 1e-10


def test_placements_and_forced_routing_must_fit_the_model() -> None:
    spec = draw_spec("deepseek_v3", 1)
    assert spec.moe is not None
    count, model = spec.moe.num_experts, random_model(spec)
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"placement: is of {wrong} experts, the layer has {count}"):
            Transformer(spec, placements={1: Placement.identity(wrong)})
    with pytest.raises(ValueError, match=r"placements: layers \[0\] have no experts; those that do: \[1"):
        Transformer(spec, placements={0: Placement.identity(count)})
    ids_TK = torch.zeros(6, spec.moe.top_k, dtype=torch.long)
    with pytest.raises(ValueError, match=r"forced_routing: layers \[0\] have no experts"):
        model.step(PackedBatch([6]), forced_routing={0: ids_TK})
    for other in (ids_TK[:5], ids_TK[:, 1:]):
        with pytest.raises(ValueError, match=r"forced_routing: shape .* in layer 1"):
            model.hidden(torch.arange(6), model.step(PackedBatch([6]), forced_routing={1: other}))


def test_load_slots_changes_what_a_slot_holds() -> None:
    spec = draw_spec("deepseek_v3", 1)
    assert spec.moe is not None
    count = spec.moe.num_experts
    start, target = Placement(count, (*range(count), 0)), Placement(count, (*range(count), 2))
    moved = with_placement(random_model(spec, dtype=torch.float64), start)
    tokens = random_tokens(spec, 1, 20)
    expected = moved(tokens)

    def expert(experts: Experts, number: int) -> tuple[Tensor, Tensor]:
        slot = experts.slots.index(number)
        return experts.w_gate_up_EFD[slot].clone(), experts.w_down_EDF[slot].clone()

    for layer in moved.placements():
        experts = moe_of(moved, layer).experts
        with pytest.raises(ValueError, match=r"slots \[\d+\] hold another expert"):
            experts.load_slots(target, {})
        with pytest.raises(ValueError, match="slots on 1 ranks do not fit"):
            experts.load_slots(Placement.identity(count), {})
        gate_up, down = expert(experts, 2)
        for changes in ({count: (gate_up[0], down)}, {count: (gate_up, down[:, :1])}, {-1: (gate_up, down)}):
            with pytest.raises(ValueError, match=r"changes: weights of shapes .* do not fit"):
                experts.load_slots(target, {count: (gate_up, down), **changes})
        assert experts.slots == start.slots
        experts.load_slots(target, {count: expert(experts, 2)})
        assert experts.slots == target.slots
    assert relative_difference(moved(tokens), expected) < 1e-10


def test_casting_a_model_leaves_the_correction_bias_in_fp32() -> None:
    model = random_model(draw_spec("deepseek_v3", 1))
    router = moe_of(model, -1).router
    assert router.bias_E is not None
    bias_E = router.bias_E.clone()
    assert model.to(torch.bfloat16) is model
    assert router.weight.dtype == torch.bfloat16
    assert router.bias_E.dtype == torch.float32 and torch.equal(router.bias_E, bias_E)
