"""Schedules by hand-computed values, and their shape for any run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.spec.presets import preset
from abyssal.train.config import BalanceConfig, OptimizerConfig, TrainConfig, width_init_std
from abyssal.train.schedules import decay, factor, warmup


def test_warmup_reaches_one_and_never_starts_at_zero() -> None:
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == 1.0


def test_decay_shapes() -> None:
    assert decay(0.5, "linear", 0.2) == pytest.approx(0.6)
    assert decay(0.5, "cosine", 0.2) == pytest.approx(0.6)
    assert decay(0.25, "cosine", 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert decay(0.7, "constant", 0.0) == 1.0
    assert decay(7.0, "linear", 0.2) == pytest.approx(0.2)


def test_factor_has_warmup_plateau_and_floor() -> None:
    values = [factor(step, 101, warmup_steps=10, kind="linear", decay_start=0.5, floor=0.1) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9:51] == pytest.approx([1.0] * 42)
    assert values[75] == pytest.approx(1 - 0.9 * (75 - 50) / 50)
    assert values[100] == pytest.approx(0.1)


@given(
    num_steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 400),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    decay_start=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_factor_rises_then_falls_within_bounds(num_steps, warmup_steps, kind, decay_start, floor) -> None:
    values = [factor(step, num_steps, warmup_steps, kind, decay_start, floor) for step in range(num_steps)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    top = values.index(max(values))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[top:]))


def test_learning_rate_warms_up_within_a_tenth_of_a_short_run() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=50, lr_floor=0.1)
    assert config.learning_rate(1, 20) == 1.0
    assert config.learning_rate(19, 20) == pytest.approx(0.1)


def test_bias_speed_is_zero_at_the_end() -> None:
    config = BalanceConfig(bias_speed=0.5, bias_freeze=0.1)
    assert [config.speed(step, 100) for step in (0, 89, 90, 99)] == [0.5, 0.5, 0.0, 0.0]
    falling = BalanceConfig(bias_speed=0.5, bias_freeze=0.0, bias_decay="linear")
    assert falling.speed(50, 101) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "does not divide batch_size 6"),
        ({"mtp_weight": -0.1}, "mtp_weight is -0.1; give at least 0"),
        ({"mtp_weight": math.nan}, "mtp_weight is nan"),
        ({"seed": -1}, "seed is -1; give 0 to"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
    ],
)
def test_config_names_the_field_that_is_wrong(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize("value", [math.nan, -1.0])
@pytest.mark.parametrize("kind", [OptimizerConfig, BalanceConfig])
def test_no_number_of_the_optimizer_or_the_balance_is_nan_or_negative(kind, value) -> None:
    names = [field.name for field in dataclasses.fields(kind) if field.type in ("float", "int")]
    assert len(names) >= 3
    for name in names:
        with pytest.raises(ValueError, match=f"^{name} is {value}; give "):
            kind(**{name: value})


@pytest.mark.parametrize(
    "fields", [{"lr": 0.0}, {"lr": math.inf}, {"clip": 0.0}, {"beta1": 1.0}, {"decay_start": 2.0}, {"lr_floor": 1.5}]
)
def test_optimizer_refuses_what_would_not_train(fields) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} is "):
        OptimizerConfig(**fields)


def test_config_and_schedules_are_free_of_torch() -> None:
    code = "import sys, abyssal.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_width_decides() -> None:
    assert width_init_std(7168) == pytest.approx(0.006, rel=0.02)
    assert TrainConfig().resolved(preset("tiny")).compute == "float32"
    assert TrainConfig().resolved(preset("small")).compute == "bfloat16"
    assert TrainConfig(compute="float32").resolved(preset("small")).compute == "float32"
