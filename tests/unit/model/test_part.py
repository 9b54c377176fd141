"""A model of which a pipeline rank holds some layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abyssal.checkpoint.hf import load_model, save_model
from abyssal.model.part import ModelPart, cut_layers
from abyssal.model.transformer import Transformer
from abyssal.spec.placement import Placement
from tests.support.checkpoints import SMALL, random_model

STAGES = cut_layers(SMALL.num_layers, 2)
HELD = {
    (0,): ("embed.", "layers.0."),
    (1,): ("embed.", "layers.1.", "norm.", "head.", "mtp."),  # MTP reads the embedding
    (1, 0): ("",),
}


@pytest.mark.parametrize("held", HELD)
def test_it_begins_with_the_whole_models_weights(held: tuple[int, ...]) -> None:
    whole = Transformer(SMALL)
    whole.init_weights(torch.Generator().manual_seed(5))
    part = Transformer(SMALL, part=ModelPart.of(STAGES, held))
    part.init_weights(torch.Generator().manual_seed(5))
    check(part, whole, held)
    trained = {name for name, parameter in part.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in part.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("held", HELD)
def test_a_folder_is_loaded_in_part(held: tuple[int, ...], tmp_path: Path) -> None:
    whole = random_model()
    save_model(whole, tmp_path / "model", "fp32")
    check(load_model(tmp_path / "model", torch.float32, part=ModelPart.of(STAGES, held)), whole, held)


def check(part: Transformer, whole: Transformer, held: tuple[int, ...]) -> None:
    assert part.device == torch.device("cpu")
    wanted = whole.state_dict()
    for name, tensor in part.state_dict().items():
        assert tensor.is_meta != name.startswith(HELD[held]), name
        assert tensor.shape == wanted[name].shape
        if not tensor.is_meta:
            assert torch.equal(tensor, wanted[name]), name


def test_the_experts_of_a_rank_are_drawn_alike_in_any_part() -> None:
    placement = Placement(4, (3, 1, 0, 2), 2)
    placements = {1: placement, 2: placement}
    whole = Transformer(SMALL)
    whole.init_weights(torch.Generator().manual_seed(5))
    part = Transformer(SMALL, placements=placements, expert_rank=1, part=ModelPart.of(STAGES, [1]))
    part.init_weights(torch.Generator().manual_seed(5))
    name = "layers.1.ffn.experts.w_down_EDF"
    assert torch.equal(part.get_parameter(name), whole.get_parameter(name)[[0, 2]])


def test_layers_are_cut_evenly_or_as_they_are_told() -> None:
    assert cut_layers(6, 3) == (range(2), range(2, 4), range(4, 6))
    assert cut_layers(7, 3, (1, 2, 4)) == (range(1), range(1, 3), range(3, 7))
    with pytest.raises(ValueError, match=r"61 layers do not divide over 16 stages; .*--stage-layers"):
        cut_layers(61, 16)
    for sizes in ((3, 3), (0, 3, 4), (1, 1, 1)):
        with pytest.raises(ValueError, match="give 3 numbers of at least 1 that add up to 7"):
            cut_layers(7, 3, sizes)
