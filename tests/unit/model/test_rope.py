"""Rotary positions against their definition in plain Python, at the far end of the longest models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from abyssal.model.rope import Rotation, apply_rotation, rope_frequencies, rotation, softmax_scale
from abyssal.spec.model import YarnSpec
from abyssal.spec.presets import preset

V3 = preset("deepseek-v3")


@pytest.mark.parametrize("position", [0, 1, 4097, 131_071, 163_839])
def test_far_positions_keep_their_angle(position: int) -> None:
    """In FP32 the angle of position 163,839 would be off by up to 0.01 radians."""
    turns = rotation(V3, torch.tensor([position]), torch.float32).turns[0]
    assert turns.dtype == torch.complex64
    for turn, frequency in zip(turns.tolist(), rope_frequencies(V3).tolist(), strict=True):
        assert abs(turn - complex(math.cos(position * frequency), math.sin(position * frequency))) < 2e-7


def test_yarn_divides_slow_frequencies_and_leaves_fast_ones() -> None:
    """V3: fewer than one turn in 4096 positions is divided by 40, more than 32 is left alone, a ramp between."""
    plain, extended = rope_frequencies(replace(V3, yarn=None)), rope_frequencies(V3)
    for before, after in zip(plain.tolist(), extended.tolist(), strict=True):
        turns = before * 4096 / (2 * math.pi)
        if turns < 0.5:
            assert math.isclose(after, before / 40, rel_tol=1e-12)
        elif turns > 40:
            assert after == before
        else:
            assert before / 40 <= after * (1 + 1e-12) and after <= before * (1 + 1e-12)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "magnitude", "squared"),
    [(1.0, 1.0, 0.0, 1.0), (1.0, 0.707, None, 0.707), (None, None, 1.0, 0.0)],
)
def test_yarn_scales(
    mscale: float | None, mscale_all_dim: float | None, magnitude: float | None, squared: float
) -> None:
    def m(x: float) -> float:
        return 0.1 * x * math.log(40) + 1

    spec = replace(V3, yarn=YarnSpec(40.0, 4096, mscale=mscale, mscale_all_dim=mscale_all_dim))
    expected = m(1.0) / m(0.707) if magnitude is None else m(magnitude)
    assert math.isclose(rotation(spec, torch.tensor([5]), torch.float64).turns[0, 3].abs().item(), expected)
    assert math.isclose(softmax_scale(spec), 192**-0.5 * m(squared) ** 2)


def test_pairs_and_halves() -> None:
    """A quarter turn of the first pair, an eighth of the second, in both layouts."""
    turns = torch.polar(torch.ones(1, 2), torch.tensor([[math.pi / 2, math.pi / 4]]))
    x, root = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), math.sqrt(0.5)
    pairs = apply_rotation(x, Rotation(turns, interleaved=True))
    torch.testing.assert_close(pairs, torch.tensor([[-2.0, 1.0, -root, 7 * root]]))
    halves = apply_rotation(x, Rotation(turns, interleaved=False))
    torch.testing.assert_close(halves, torch.tensor([[-3.0, -2 * root, 1.0, 6 * root]]))
