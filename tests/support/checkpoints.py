"""Small models with random weights, and folders made from them to be read, broken and converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.checkpoint.hf import save_model
from abyssal.checkpoint.layout import Format
from abyssal.model.transformer import Transformer
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.spec.placement import Placement

SMALL = ModelSpec(
    family="deepseek_v3",
    vocab_size=40,
    hidden_size=136,
    num_layers=2,
    dense_ffn_size=150,
    attention=LatentAttentionSpec(
        num_heads=2, q_lora_rank=130, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=66
    ),
    moe=MoESpec(num_experts=4, num_shared_experts=1, top_k=2, expert_ffn_size=30, num_groups=2, num_kept_groups=1),
    num_dense_layers=1,
    mtp_depth=1,
)
"""Every kind of tensor once, with several and with ragged blocks of 128."""


def random_model(
    spec: ModelSpec = SMALL,
    dtype: torch.dtype = torch.float32,
    placements: dict[int, Placement] | None = None,
    seed: int = 0,
) -> Transformer:
    """Every parameter and buffer random, norms and biases too, so that no two tensors can be taken for each other."""
    model = Transformer(spec, placements=placements, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def saved(folder: Path, dtype: Format = "fp32", spec: ModelSpec = SMALL, **options: int | bool) -> Path:
    """The folder of a random model."""
    save_model(random_model(spec), folder, dtype, **options)  # pyright: ignore[reportArgumentType]
    return folder


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> Path:
    """Change the tensors of a folder with the safetensors library."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(model: Transformer, other: Transformer) -> None:
    """Bit for bit, by name."""
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
