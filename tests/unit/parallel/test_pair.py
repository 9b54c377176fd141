"""The overlapped pair: an interleaving is data that is checked, and no number shows that two passes were shuffled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.model.lora import LoraConfig, add_lora
from abyssal.model.transformer import Transformer
from abyssal.parallel.pipeline.chunk import ModelChunk
from abyssal.parallel.pipeline.chunk_pass import ChunkPass
from abyssal.parallel.pipeline.executor import Pair, one_after_the_other
from abyssal.parallel.pipeline.interleaving import (
    BACKWARD_ROW,
    FORWARD_ROW,
    SERIAL,
    SHARED,
    SHARED_BETWEEN,
    V3,
    WEIGHTS,
    Instruction,
    Interleaving,
    Move,
)
from abyssal.parallel.pipeline.pair import OverlappedPair
from abyssal.train.loop import build_model
from tests.support.many_ranks import CONFIG
from tests.support.pipelines import SPEC, batch, micro_batches, take_gradients


def through(
    model: Transformer, ahead: range, back: range, pair: Pair, num_stages: int = 4
) -> tuple[list[Tensor | None], dict[str, Tensor], list[Any]]:
    """A forward on one chunk and a backward on another, which had its forward before: outputs, gradients, records."""
    parts = micro_batches(model, batch(2), 2)
    each = model.spec.num_layers // num_stages
    chunks = {}
    for layers in {ahead, back}:
        last = layers.stop == model.spec.num_layers
        chunks[layers] = ModelChunk(model, layers, num_stages - 1 if last else layers.start // each, num_stages)
        chunks[layers].begin(parts)
    shape, generator = (len(parts[0].inputs[0]), SPEC.hidden_size), torch.Generator().manual_seed(5)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    dtype = model.embedded(parts[0].inputs[0][:1]).dtype
    x_TD, earlier_TD, gradient_TD = (one.to(dtype) for one in drawn)
    behind = chunks[back]
    behind.forward(1, None if behind.is_first else earlier_TD)
    made = pair(
        chunks[ahead], 0, None if ahead.start == 0 else x_TD, behind, 1, None if behind.is_last else gradient_TD
    )
    behind.catch_up()
    gradients = take_gradients(model)
    records = [*chunks[ahead].losses.values(), *behind.losses.values(), chunks[ahead].steps[0].balance_losses]
    return list(made), gradients, records


PLACES = {
    "two stages in the middle": (range(2, 4), range(4, 6)),
    "the same stage": (range(2, 4), range(2, 4)),
    "embedding and head": (range(0, 2), range(6, 8)),
    "head and embedding": (range(6, 8), range(0, 2)),
    "one layer and three": (range(2, 3), range(3, 6)),
    "three layers and one": (range(3, 6), range(2, 3)),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("interleaving", [V3, SERIAL], ids=lambda one: one.name)
def test_a_pair_has_the_bits_of_one_after_the_other(where: str, interleaving: Interleaving) -> None:
    model = build_model(SPEC, CONFIG)
    ahead, back = PLACES[where]
    wanted = through(model, ahead, back, one_after_the_other)
    found = through(model, ahead, back, OverlappedPair(interleaving))
    assert_same(found, wanted)


def assert_same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        assert ours is None if theirs is None else torch.equal(ours, theirs)
    assert found[1].keys() == wanted[1].keys() and len(wanted[1]) > 5
    assert all(torch.equal(found[1][name], gradient) for name, gradient in wanted[1].items())
    assert found[2] == wanted[2]


FEATURES: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": ("norm", "up_projection", "swiglu")},
    "bfloat16": {"compute": "bfloat16"},
    "fp8": {"compute": "bfloat16", "precision": "fp8", "recompute": ("norm", "up_projection", "swiglu")},
    "adapters": {},
}


def model_with(name: str) -> Transformer:
    model = build_model(SPEC, dataclasses.replace(CONFIG, **FEATURES[name]))
    if name == "adapters":
        targets = ("attention", "experts", "ffn")
        add_lora(model, LoraConfig(rank=3, alpha=6.0, targets=targets), torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("name", FEATURES)
def test_so_it_has_with(name: str) -> None:
    model = model_with(name)
    for ahead, back in (range(0, 2), range(6, 8)), (range(2, 4), range(0, 2)):
        wanted = through(model, ahead, back, one_after_the_other)
        assert_same(through(model, ahead, back, OverlappedPair()), wanted)


def test_what_a_pair_leaves_over_is_done_in_the_next_or_by_its_chunk() -> None:
    model = build_model(SPEC, CONFIG)
    parts, pair = micro_batches(model, batch(2), 3), OverlappedPair()
    chunks = [ModelChunk(model, range(0, 4), 0, 2), ModelChunk(model, range(4, 8), 1, 2)]

    def three(catch_up_between: bool) -> dict[str, Tensor]:
        for chunk in chunks:
            chunk.begin(parts)
        inputs = [chunks[0].forward(number, None) for number in range(3)]
        chunks[1].forward(0, inputs[0])
        gradients = []
        for number in (1, 2):
            gradients.append(pair(chunks[1], number, inputs[number], chunks[1], number - 1, None)[1])
            name = "layers.4.attention.kv_a.weight"
            if catch_up_between:
                chunks[1].catch_up()
            elif number == 1:
                assert model.get_parameter(name).grad is None, "the last of its weights are left over"
        assert model.get_parameter(name).grad is not None
        gradients.append(chunks[1].backward_input(2, None))
        chunks[1].backward_weight(2)
        for number, gradient_TD in enumerate(gradients):
            chunks[0].backward_input(number, gradient_TD)
            chunks[0].backward_weight(number)
        return take_gradients(model)

    wanted, found = three(True), three(False)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert found.keys() == wanted.keys()


def test_weights_left_over_that_fail_name_stage_and_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(SPEC, CONFIG)
    chunk, parts = ModelChunk(model, range(4, 8), 1, 2), micro_batches(model, batch(2), 2)
    chunk.begin(parts)
    x_TD = torch.zeros(len(parts[0].inputs[0]), SPEC.hidden_size, dtype=torch.float64)
    chunk.forward(0, x_TD)
    OverlappedPair()(chunk, 1, x_TD, chunk, 0, None)

    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(ChunkPass, "move", fail)
    with pytest.raises(MemoryError) as caught:
        chunk.catch_up()
    assert caught.value.__notes__ == ["in weight attention_in of stage 1 for micro-batch 0, left over by a pair"]


def changed(change: Callable[[list[Instruction]], Any]) -> Callable[[], Interleaving]:
    def make() -> Interleaving:
        instructions = list(V3.instructions)
        change(instructions)
        return Interleaving("mine", tuple(instructions))

    return make


def place_of(instructions: list[Instruction], text: str) -> int:
    return [str(one) for one in instructions].index(text)


def move_to_front(text: str) -> Callable[[list[Instruction]], None]:
    return lambda found: found.insert(0, found.pop(place_of(found, text)))


def shift_behind(text: str) -> Callable[[list[Instruction]], None]:
    def change(found: list[Instruction]) -> None:
        place = place_of(found, text)
        found[place] = dataclasses.replace(found[place], shift=-1)

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(lambda found: found.pop(0)), "F has wait dispatch where start dispatch comes next"),
        (changed(lambda found: found.append(found[-1])), "F has run attention_out where start dispatch comes next"),
        (changed(move_to_front("F wait dispatch")), "F has wait dispatch where start dispatch comes next"),
        (changed(move_to_front("F run shared")), "F needs run shared once, after wait dispatch"),
        (changed(lambda found: found.pop(place_of(found, "B run shared"))), "B needs run shared once"),
        (changed(move_to_front("B weight experts")), "weight experts stands before its stage"),
        (changed(shift_behind("F run finish")), "only weights can be behind"),
        (changed(move_to_front("B run finish ahead")), "B is ahead in the next layer before this one is through"),
        (changed(lambda found: found.pop(place_of(found, "B weight shared"))), "B needs each of 4 once"),
        (lambda: Interleaving.parse("mine", "F start experts"), "'F start experts' is no move"),
        (lambda: Interleaving.parse("mine", "F run experts later"), "'F run experts later' is no move"),
    ],
)
def test_what_is_no_interleaving_is_refused(make: Callable[[], Interleaving], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("counts", [(1, 1), (3, 3), (1, 4), (4, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("interleaving", [V3, SERIAL], ids=lambda one: one.name)
def test_unrolled_every_layer_makes_every_move_in_order(interleaving: Interleaving, counts: tuple[int, int]) -> None:
    placed = list(interleaving.unrolled(*counts))
    for side, row, number in ("F", FORWARD_ROW, counts[0]), ("B", BACKWARD_ROW, counts[1]):
        moves = [(one.place, one.move) for one in placed if one.side == side and one.move.verb != "weight"]
        in_row = [(place, move) for place in range(number) for move in row if move != SHARED]
        assert [one for one in moves if one[1] != SHARED] == in_row and len(moves) == number * len(row)
        after, before = SHARED_BETWEEN[side]  # type: ignore[index]
        for place in range(number):
            assert moves.index((place, after)) < moves.index((place, SHARED)) < moves.index((place, before))
    left_over = interleaving.left_over(*counts)
    before = [one for one in placed if one.place < 0]
    assert [one.move for one in before] == [Move("weight", "attention_in")] * (interleaving is V3)
    assert len(left_over) == (interleaving is V3 and counts[1] >= counts[0])
    placed = [one for one in placed if one.place >= 0] + left_over
    weights = [(one.place, one.move) for one in placed if one.move.verb == "weight"]
    assert sorted(map(str, weights)) == sorted(str((place, move)) for place in range(counts[1]) for move in WEIGHTS)
    for place, move in weights:
        own = [one for one in placed if one.side == "B" and one.place == place]
        moves = [one.move for one in own]
        assert moves.index(move) > moves.index(Move("run", move.stage))


def test_every_communication_of_v3_passes_under_computation_of_the_other_side() -> None:
    placed = list(V3.unrolled(3, 3))
    for side, other in ("F", "B"), ("B", "F"):
        for stage in ("dispatch", "combine"):
            texts = [(one.side, one.place, str(one.move)) for one in placed]
            between = placed[texts.index((side, 1, f"start {stage}")) : texts.index((side, 1, f"wait {stage}"))]
            assert any(one.side == other and one.move.verb == "run" for one in between), (side, stage)
