"""The same small model here and in transformers, with the same weights, through a folder that both read."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.hf import load_model, save_model
from abyssal.model.transformer import Transformer
from abyssal.spec.presets import preset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_model(name: str, folder: Path) -> Path:
    """Preset ``name`` without MTP, random weights from a fixed seed, as a Hugging Face folder; made once."""
    if (folder / name).exists():
        return folder / name
    model = Transformer(replace(preset(name), mtp_depth=0, init_std=0.02))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / name, "fp32")
    return folder / name


def load_ours(folder: Path, dtype: str) -> Transformer:
    return load_model(folder, dtype=DTYPES[dtype])


def load_theirs(folder: Path, dtype: str, experts: str) -> Any:
    """transformers' model with one of its implementations of the experts, attention by torch's fused kernel."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation="sdpa", experts_implementation=experts
    )
