"""Converted folders equal saved ones, whatever interrupts the conversion; nothing is left out or overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.hf import load_model, save_model
from abyssal.checkpoint.layout import FORMATS, Format
from abyssal.kernels.fp8_block import dequantise_blocks
from tests.support.checkpoints import SMALL, assert_same_weights, contents, random_model, rewrite, saved

SHARD = 150_000
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    """The same random model saved in each format, in several shards."""
    folder = tmp_path_factory.mktemp("sources")
    return {form: saved(folder / form, form, max_shard_bytes=SHARD) for form in FORMATS}


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("dtype", FORMATS)
def test_converting_fp32_is_saving_in_the_other_format(
    dtype: Format, sources: dict[Format, Path], tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    report = convert(
        sources["fp32"], tmp_path / "out", dtype, max_shard_bytes=SHARD, progress=lambda *step: done.append(step)
    )
    assert contents(tmp_path / "out") == contents(sources[dtype])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert done == sorted(done) and done[-1] == (report.num_bytes, report.num_bytes)
    weights = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(weights) == report.num_files
    assert sum(tensor.nbytes for file in weights for tensor in file.values()) == report.num_bytes


@pytest.mark.parametrize("dtype", FORMATS)
def test_converting_to_the_same_format_copies(dtype: Format, sources: dict[Format, Path], tmp_path: Path) -> None:
    convert(sources[dtype], tmp_path / "out", dtype, max_shard_bytes=SHARD)
    assert contents(tmp_path / "out") == contents(sources[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fp8_is_dequantised(dtype: Format, sources: dict[Format, Path], tmp_path: Path) -> None:
    convert(sources["fp8"], tmp_path / "out", dtype)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert_same_weights(load_model(tmp_path / "out"), load_model(sources["fp8"], kind))
    stored = {name: t for file in sources["fp8"].glob("*.safetensors") for name, t in load_file(file).items()}
    expected = dequantise_blocks(stored[Q_A], stored[f"{Q_A}_scale_inv"], kind)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[Q_A], expected)


def test_without_mtp(sources: dict[Format, Path], tmp_path: Path) -> None:
    convert(sources["fp32"], tmp_path / "out", "fp32", include_mtp=False)
    save_model(random_model(), tmp_path / "saved", "fp32", include_mtp=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")


def test_other_files_and_fields_go_through(sources: dict[Format, Path], tmp_path: Path) -> None:
    source = _copy(sources["bf16"], tmp_path / "in")
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": "somewhere", "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    kept = {"tokenizer.json": b"{}", "generation_config.json": b"{ }", "chat_template.jinja": b"\xff"}
    for name, data in ({**kept, ".hidden": b"", "pytorch_model.bin": b"old"}).items():
        (source / name).write_bytes(data)
    (source / "figures").mkdir()
    convert(source, tmp_path / "out", "fp32")
    found = contents(tmp_path / "out")
    assert sorted(found) == sorted([*kept, "config.json", "model.safetensors"])
    assert {name: found[name] for name in kept} == kept
    written = json.loads(found["config.json"])
    assert written == config | {"dtype": "float32", "torch_dtype": "float32"}
    assert list(written) == list(config)


def test_power_of_two_scales_stay_so(sources: dict[Format, Path], tmp_path: Path) -> None:
    source = _copy(sources["fp8"], tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").write_text(json.dumps(config))
    file = next(file.name for file in source.glob("model-*") if Q_A in load_file(file))

    def unquantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A] = dequantise_blocks(tensors[Q_A], tensors.pop(f"{Q_A}_scale_inv"))

    rewrite(source, unquantise, file)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{Q_A}_scale_inv"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out", "fp8")
    mantissa, _ = torch.frexp(load_file(tmp_path / "out" / "model.safetensors")[f"{Q_A}_scale_inv"])
    assert (mantissa == 0.5).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_frequencies_of_old_checkpoints_are_not_left_out(tmp_path: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.1])}
    source = rewrite(saved(tmp_path / "in"), lambda tensors: tensors.update(derived))
    convert(source, tmp_path / "out", "bf16")
    name, value = next(iter(derived.items()))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)


# ---- refused ----


def test_a_tensor_is_never_left_out(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_a_proj.lora_A": torch.ones(2, 2)}
    source = rewrite(saved(tmp_path / "in"), lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=r"q_a_proj\.lora_A in model\.safetensors is unexpected"):
        convert(source, tmp_path / "out", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_existing_destination_is_not_touched(sources: dict[Format, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: exists"):
        convert(sources["fp32"], tmp_path / "out", "bf16")
    with pytest.raises(ValueError, match="exists"):
        convert(sources["fp32"], sources["fp32"], "bf16")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other\.partial: is there and is no unfinished conversion"):
        convert(sources["fp32"], tmp_path / "other", "bf16")
    assert sorted(contents(tmp_path)) == ["other.partial/mine.txt"]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named(dtype: Format, bad: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A][129, 7] = bad

    source = rewrite(saved(tmp_path / "in"), spoil)
    with pytest.raises(ValueError, match=Q_A):
        convert(source, tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nan_codes_are_named(sources: dict[Format, Path], tmp_path: Path) -> None:
    source = _copy(sources["fp8"], tmp_path / "in")
    file = next(file.name for file in source.glob("model-*") if Q_A in load_file(file))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A].view(torch.uint8)[129, 7] = 0xFF

    rewrite(source, spoil, file)
    for dtype in FORMATS:
        with pytest.raises(ValueError, match=f"{file}: {Q_A} holds an infinity or a NaN"):
            convert(source, tmp_path / dtype, dtype)


def test_a_value_beyond_bf16_is_named(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A][0, 0] = 3.4e38  # finite in FP32, infinite in BF16

    with pytest.raises(ValueError, match=Q_A):
        convert(rewrite(saved(tmp_path / "in"), spoil), tmp_path / "out", "bf16")


def test_a_disk_too_small(sources: dict[Format, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match=r"out\.partial: needs .* more bytes and the disk has 1,000 free"):
        convert(sources["fp32"], tmp_path / "out", "bf16")


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "bf16", "max_shard_bytes": -1}])
def test_odd_arguments(options: dict[str, Any], sources: dict[Format, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'int8'|max_shard_bytes is -1"):
        convert(sources["fp32"], tmp_path / "out", **options)


# ---- interrupted ----


class _PowerCut(BaseException):
    pass


@contextmanager
def _power_cut(folder: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Stop at the ``moment``-th call that changes the disk, half way through a write, then lose what was not synced.

    Yields a function that tells the calls so far.
    """
    synced = {path.stat().st_ino: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    count = 0
    originals = {name: getattr(os, name) for name in ("pwrite", "write", "fsync", "replace", "rename", "ftruncate")}

    def remember(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file():
            synced[path.stat().st_ino] = path.read_bytes()

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                if name in ("pwrite", "write"):
                    descriptor, data, *offset = arguments
                    originals[name](descriptor, data[: len(data) // 2], *offset)
                    if name == "write":  # to the journal: let the torn line be what is found
                        remember(descriptor)
                raise _PowerCut
            if name != "fsync":
                return originals[name](*arguments)
            return remember(arguments[0])  # instead of syncing, which is slow

        return call

    with monkeypatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, wrap(name))
        with suppress(_PowerCut):
            yield lambda: count
    if count >= moment:
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(synced.get(path.stat().st_ino, b""))


FEW_TENSORS = replace(SMALL, num_layers=1, num_dense_layers=0, moe=None, mtp_depth=0)


def test_a_power_cut_at_any_moment_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dtype": "fp8", "max_shard_bytes": 60_000, "sync_bytes": 15_000}
    source = saved(tmp_path / "in", "fp32", FEW_TENSORS)
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    assert len(expected) >= 4  # two shards or more, index, config
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and what it does is played by _power_cut
    with _power_cut(tmp_path / "work", 1 << 30, monkeypatch) as calls:
        convert(source, tmp_path / "work" / "out", **options)
    total = calls()
    assert total > 60
    for moment in (*range(1, total - 12, 9), *range(total - 12, total + 1)):
        work = tmp_path / f"cut at {moment}"
        for cut in (moment, 12):  # a second time while it is making good the first
            with _power_cut(work, cut, monkeypatch):
                _go_on(source, work / "out", options)
        _go_on(source, work / "out", options)
        assert contents(work) == {f"out/{name}": data for name, data in expected.items()}, work
        shutil.rmtree(work)


def _go_on(source: Path, out: Path, options: dict[str, Any]) -> None:
    if not out.exists() or out.with_name("out.partial").exists():
        convert(source, out, **options)


def test_work_done_is_not_done_again(
    sources: dict[Format, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    options: dict[str, Any] = {"dtype": "bf16", "sync_bytes": 20_000}
    with _power_cut(tmp_path, 120, monkeypatch):
        convert(sources["fp32"], tmp_path / "out", **options, progress=lambda done, total: written.append(done))
    before = written[-1]
    assert before > 100_000 and not (tmp_path / "out").exists()
    convert(sources["fp32"], tmp_path / "out", **options, progress=lambda done, total: written.append(done - before))
    assert -20_000 < next(step for step in written[written.index(before) + 1 :]) < 20_000


def test_an_unfinished_conversion_is_not_mixed_with_another(
    sources: dict[Format, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _copy(sources["fp32"], tmp_path / "in")
    with _power_cut(tmp_path / "out.partial", 40, monkeypatch):
        convert(source, tmp_path / "out", "fp8", sync_bytes=20_000)
    for options in ({"dtype": "bf16"}, {"dtype": "fp8", "include_mtp": False}, {"dtype": "fp8", "max_shard_bytes": 9}):
        with pytest.raises(ValueError, match=r"out\.partial: holds an unfinished conversion of other files or with"):
            convert(source, tmp_path / "out", **options)  # pyright: ignore[reportArgumentType]
    os.utime(source / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="unfinished conversion of other files"):
        convert(source, tmp_path / "out", "fp8")


def test_two_conversions_do_not_work_on_one_folder(sources: dict[Format, Path], tmp_path: Path) -> None:
    refusals: list[str] = []

    def again(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(ValueError) as error:
                convert(sources["fp32"], tmp_path / "out", "bf16")
            refusals.append(str(error.value))

    convert(sources["fp32"], tmp_path / "out", "bf16", progress=again)
    assert len(refusals) == 1 and "another conversion is at work" in refusals[0]


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
import torch
from abyssal.checkpoint.convert import convert

torch.set_num_threads(1)
source, out, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), 0
generator = random.Random(seed)
start = time.monotonic()
convert(source, out + "-timed", "fp8", max_shard_bytes=2_000_000, sync_bytes=200_000)
whole = time.monotonic() - start
for _ in range(8):
    child = os.fork()
    if not child:
        convert(source, out, "fp8", max_shard_bytes=2_000_000, sync_bytes=200_000)
        os._exit(0)
    time.sleep(generator.uniform(0, 0.6 * whole))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    kills += 1
if not os.path.exists(out) or os.path.exists(out + ".partial"):
    convert(source, out, "fp8", max_shard_bytes=2_000_000, sync_bytes=200_000)
print(kills)
"""


def test_killed_again_and_again(tmp_path: Path) -> None:
    from abyssal.spec.presets import preset

    source = saved(tmp_path / "in", "bf16", preset("tiny"))
    arguments = [str(source), str(tmp_path / "out"), str(os.getpid())]
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 1
    assert contents(tmp_path / "out") == contents(tmp_path / "out-timed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out-timed"]
