"""What loading and converting cost in memory, measured in processes of their own.

The files are sparse (a header and a hole), so gigabytes of weights cost little disk and time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from abyssal.checkpoint.layout import Format, plan_shards, store
from abyssal.checkpoint.names import checkpoint_table, scale_name
from abyssal.checkpoint.safetensors_file import SafetensorsReader
from abyssal.checkpoint.safetensors_header import format_header
from abyssal.checkpoint.sharded import save_sharded
from abyssal.model.transformer import Transformer
from abyssal.spec.hf_config import write_config
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.text.tokenizer import train_bpe
from abyssal.train.config import TrainConfig

GIB = 1 << 30

WIDE = ModelSpec(
    family="deepseek_v3",
    vocab_size=8192,
    hidden_size=1024,
    num_layers=3,
    dense_ffn_size=4096,
    attention=LatentAttentionSpec(
        num_heads=8, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    moe=MoESpec(num_experts=64, num_shared_experts=1, top_k=8, expert_ffn_size=1280),
    num_dense_layers=1,
)
"""Over half a billion parameters, nearly all in stacked experts."""

SMALLER = replace(WIDE, num_layers=2, moe=MoESpec(num_experts=8, num_shared_experts=1, top_k=8, expert_ffn_size=1280))

ONE_TENSOR = replace(
    WIDE,
    vocab_size=512,
    hidden_size=128,
    num_layers=1,
    dense_ffn_size=128,
    moe=None,
    num_dense_layers=0,
    attention=LatentAttentionSpec(
        num_heads=1536, q_lora_rank=1024, kv_lora_rank=8, qk_nope_head_dim=1022, qk_rope_head_dim=2, v_head_dim=1
    ),
)
"""The query projection alone is 1,572,864 x 1024: 3 GiB in BF16."""


def _sparse(folder: Path, spec: ModelSpec, dtype: Format) -> int:
    """A model folder whose weights are zeros that take no disk; the bytes of its weights."""
    folder.mkdir()
    (shard,) = plan_shards([store(piece, dtype) for piece in checkpoint_table(spec)], 1 << 50)
    first, header = format_header(shard.entries, {"format": "pt"})
    with (folder / shard.file).open("wb") as file:
        file.write(first)
        file.truncate(header.file_bytes)
    plain = "float32" if dtype == "fp32" else "bfloat16"
    (folder / "config.json").write_text(json.dumps(write_config(spec, plain, "fp8" if dtype == "fp8" else None)))
    return shard.num_bytes


def _measured(code: str, *arguments: object) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


MEMORY_OF_A_LOAD = """
import json, sys
import torch
from abyssal.checkpoint.hf import load_model

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

warm, folder, dtype = sys.argv[1:]
load_model(warm)  # the allocator, the thread pools and the modules
before = status("VmRSS")
model = load_model(folder, dtype=getattr(torch, dtype))
weights = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"weights": weights, "now": status("VmRSS") - before, "peak": status("VmHWM") - before}))
"""


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bf16", "bfloat16"),
        pytest.param("fp8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bf16", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_takes_less_than_1_15_times_the_weights(stored: Format, dtype: str, tmp_path: Path) -> None:
    _sparse(tmp_path / "warm", SMALLER, stored)
    _sparse(tmp_path / "model", WIDE, stored)
    found = _measured(MEMORY_OF_A_LOAD, tmp_path / "warm", tmp_path / "model", dtype)
    assert found["weights"] > GIB
    assert found["weights"] * 0.9 < found["now"] <= found["peak"] < 1.15 * found["weights"], found


MEMORY_OF_A_CONVERSION = """
import json, sys, threading
from abyssal.checkpoint.convert import convert

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

anonymous = [status("RssAnon")]
convert(sys.argv[1], sys.argv[2], "fp8", progress=lambda done, total: anonymous.append(status("RssAnon")))
print(json.dumps({"anonymous": max(anonymous), "peak": status("VmHWM")}))
"""


@pytest.mark.slow
def test_converting_a_tensor_of_3_gib_takes_little_memory(tmp_path: Path) -> None:
    assert _sparse(tmp_path / "in", ONE_TENSOR, "bf16") > 3 * GIB
    name = "model.layers.0.self_attn.q_b_proj.weight"
    rows = 1536 * 1024
    with SafetensorsReader(tmp_path / "in" / "model.safetensors") as reader:
        assert reader.entries[name].shape == (rows, 1024)
        end = reader.header.offsets[name] + reader.entries[name].num_bytes
    with (tmp_path / "in" / "model.safetensors").open("r+b") as file:
        file.seek(end - 2)
        file.write(b"\x40\x40")  # 3.0 as the last of all elements
    try:
        found = _measured(MEMORY_OF_A_CONVERSION, tmp_path / "in", tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1.5 * GIB
        with SafetensorsReader(tmp_path / "out" / "model.safetensors") as reader:
            last = reader.read(name, rows - 128).float(), reader.read(scale_name(name), rows // 128 - 1)
        assert last[0].count_nonzero() == 1 and last[0][-1, -1] * last[1][-1, -1] == 3.0
        assert found["anonymous"] < found["peak"] < GIB, found  # the promise is 2 GiB whatever the model
    finally:
        for file in (tmp_path / "out").glob("*.safetensors"):
            file.unlink()


# ---- a checkpoint of a run ----

FEW_EXPERTS = replace(WIDE, moe=MoESpec(num_experts=8, num_shared_experts=1, top_k=8, expert_ffn_size=1024))
FEW_LAYERS = replace(FEW_EXPERTS, num_layers=2, dense_ffn_size=1024, vocab_size=1024)


def _run(folder: Path, spec: ModelSpec) -> Path:
    """A run whose checkpoint holds zeros."""
    folder.mkdir()
    record = {"model": asdict(spec), "config": asdict(TrainConfig().resolved(spec)), "origin": {}}
    (folder / "run.json").write_text(json.dumps(record))
    train_bpe(["some text"], 270).save(folder / "tokenizer")
    model = Transformer(spec, device="meta", dtype=torch.float32)
    tensors = {f"model/{name}": torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    save_sharded(folder / "checkpoints" / "step-00000001", tensors, {})
    return folder


MEMORY_OF_AN_EXPORT = """
import json, sys
from pathlib import Path
from abyssal.train.export import export_checkpoint

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

warm, run, destination = map(Path, sys.argv[1:])
export_checkpoint(warm, destination / "warm", "fp8")  # the allocator, the thread pools and the modules
before = status("VmRSS")
export_checkpoint(run, destination / "model", "fp8")
print(json.dumps({"peak": status("VmHWM") - before}))
"""


def test_exporting_a_checkpoint_takes_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    warm, run = _run(tmp_path / "warm", FEW_LAYERS), _run(tmp_path / "run", replace(FEW_EXPERTS, num_layers=4))
    weights = sum(path.stat().st_size for path in run.rglob("*.distcp"))
    assert weights > 0.4 * GIB
    found = _measured(MEMORY_OF_AN_EXPORT, warm, run, tmp_path / "exported")
    assert found["peak"] < 96 << 20, (found, weights)
