"""``abyssal doctor``: its table, its JSON, and what it says where native kernels are missing or of another version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abyssal.cli import fp8_cost, machine, operators, rank_support
from abyssal.cli.main import main
from abyssal.cli.rank_support import RankSupport
from abyssal.kernels import native
from abyssal.kernels.matmul import multiplies_bf16

MODULES = (
    "adamw", "fp8_entries", "fp8_tiles_native", "gate", "gemm", "latent_attention", "native", "prefill_attention",
    "race", "rms_norm", "rotary", "row_sums", "swiglu",
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured for long."""
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype, seconds: 2e9 if dtype is torch.float32 else 1e9)
    monkeypatch.setattr(fp8_cost, "measure", lambda: fp8_cost.Fp8Cost(0.2, 0.5))


def _lose_library(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    for name in MODULES:
        monkeypatch.setattr(f"abyssal.kernels.{name}.native_library", found)
    for module in (machine, operators):
        monkeypatch.setattr(module, "native_library", found)


def test_json_alone(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["bf16_products"] == multiplies_bf16()
    assert found["machine"]["native_instructions"] == native.isa_name()
    assert "gloo" in found["ranks"]["backends"] and found["ranks"]["torchrun"].endswith(("torchrun", ".run"))
    assert found["ranks"]["deep_ep"] is None or isinstance(found["ranks"]["deep_ep"], str)
    assert found["fp8"] == {"emulated": True, "step_ratio": 2.5, "bf16_seconds": 0.2, "fp8_seconds": 0.5}
    assert len({each["name"] for each in found["operators"]}) == len(found["operators"]) > 10


def test_the_table_fits_eighty_columns_and_says_what_fp8_costs(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(len(line) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    assert "about 2.5 times a BF16 step (500 and 200 ms" in text and "emulated on this CPU" in text
    assert "2.00 GFLOP/s, measured" in text
    names = [each.name for each in operators.operators()]
    assert all(sum(line.startswith(f"{name}  ") for line in lines) == 1 for name in names)


@pytest.mark.skipif(native.native_library() is None, reason="has no native kernels")
def test_every_operator_that_is_native_somewhere_is_native_here() -> None:
    found = operators.operators()
    assert "no native form here" not in {each.why for each in found}
    assert {each.name for each in found if each.training == operators.NATIVE} >= {
        "RMSNorm",
        "SwiGLU",
        "FP8 quantisation",
    }
    assert {each.name for each in found if each.inference != operators.NATIVE} == {
        "AdamW, FP32 moments",
        "AdamW, BF16 moments",
    }


def test_without_native_kernels_pytorch_runs_and_the_reason_is_told(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose_library(monkeypatch, lambda: None)
    found = operators.operators()
    assert {each.inference for each in found} == {operators.PYTORCH, None}
    assert next(each for each in found if each.name == "RMSNorm").why == "no native form here"
    assert next(each for each in found if each.name == "AdamW, FP32 moments").why == "torch's fused kernel"
    assert main(["doctor"]) == 0
    assert "pip install -e" in capsys.readouterr().out


def test_a_library_of_another_version_is_told_and_no_error(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("_native.so has interface 1, expected 2; run `pip install -e .` again")

    _lose_library(monkeypatch, refuse)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["native_instructions"] is None
    assert "interface 1, expected 2" in found["machine"]["native_problem"]
    assert operators.NATIVE not in {each["inference"] for each in found["operators"]}


def test_the_cost_of_fp8_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_cost, "REPEATS", 1)
    monkeypatch.setattr(fp8_cost, "SEQ_LEN", 16)
    cost = fp8_cost.measure()
    assert cost.bf16_seconds > 0 and cost.ratio == cost.fp8_seconds / cost.bf16_seconds > 0


def test_memory_is_no_more_than_a_container_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "1048576" if self.name == "memory.max" else "max")
    assert machine._memory() == 1048576


def test_a_gpu_is_named_with_what_runs_on_it(quick: None) -> None:
    from abyssal.cli.doctor import _gpus

    here = machine.this_machine()
    assert here.gpus or _gpus(here) == "none that torch sees"
    gpu = machine.Gpu("H100", 80 << 30, "9.0")
    text = _gpus(machine.Machine(**{**vars(here), "gpus": (gpu,)}))
    assert text.startswith("H100, 80 GiB, 9.0. ") and "no kernels of our own" in text


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tiny"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("abyssal doctor: ") and captured.err.count("\n") == 1


def test_what_there_is_for_many_ranks(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for support, told in (
        (RankSupport(("gloo",), "/bin/torchrun", None), ["gloo for CPUs, no nccl", "/bin/torchrun", "not installed"]),
        (RankSupport(("gloo", "nccl"), "torchrun", "1.2.1"), ["nccl for NVIDIA GPUs", "DeepEP            1.2.1"]),
        (RankSupport((), None, None), ["built without torch.distributed"]),
    ):
        monkeypatch.setattr(rank_support, "rank_support", lambda support=support: support)
        assert main(["doctor"]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in told), shown
